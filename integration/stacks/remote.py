"""A stack that is reached over the network: from loopback, with keys of its own."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from integration.ports import free_port, listens
from integration.stand import StandError
from integration.stand.certificates import make_certificates
from integration.stand.patience import patiently

from .stack import Stack

TRANSPORTS = ("tcp", "tls", "ssh")

SSHD_CONF = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
"""

# Nothing of the user's own: neither keys nor known hosts nor settings.
SSH = """\
#!/bin/sh
exec ssh -F none -i {folder}/user -o IdentitiesOnly=yes -o IdentityAgent=none -o BatchMode=yes \
    -o StrictHostKeyChecking=yes -o UserKnownHostsFile={folder}/known_hosts \
    -o GlobalKnownHostsFile=/dev/null "$@"
"""


class Remote:
    """A stack and how it is reached from elsewhere.

    uris -- by transport
    certificates -- folder with those of ``make_certificates``
    """

    def __init__(self, stack: Stack, uris: dict[str, str], certificates: Path) -> None:
        self.stack = stack
        self.uris = uris
        self.certificates = certificates


@contextlib.contextmanager
def remote(stack: Stack) -> Iterator[Remote]:
    """Have the stack's libvirtd listen, with and without TLS, and an sshd beside it."""
    certificates = make_certificates(stack.workspace.folder("pki"))
    tcp, tls = free_port(), free_port()
    listen = f"""\
listen_tcp = 1
listen_tls = 1
listen_addr = "127.0.0.1"
auth_tcp = "none"
tcp_port = "{tcp}"
tls_port = "{tls}"
ca_file = "{certificates}/cacert.pem"
cert_file = "{certificates}/servercert.pem"
key_file = "{certificates}/serverkey.pem"
"""
    qemu = f"""\
backup_tls_x509_cert_dir = "{certificates}"
backup_tls_x509_verify = 1
"""
    stack.stop()
    stack.start(listen=listen, qemu=qemu)
    try:
        with _sshd(stack) as ssh:
            uris = {
                "tcp": f"qemu+tcp://127.0.0.1:{tcp}/system",
                "tls": f"qemu+tls://127.0.0.1:{tls}/system?pkipath={certificates}",
                "ssh": ssh,
            }
            yield Remote(stack, uris, certificates)
    finally:
        stack.stop()
        stack.start()


@contextlib.contextmanager
def _sshd(stack: Stack) -> Iterator[str]:
    """An sshd in the stack, and the URI of libvirt by way of it."""
    folder, port = stack.workspace.folder("ssh"), free_port()
    for name in ("host", "user"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name]
        subprocess.run(generate, check=True)
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd.conf").write_text(SSHD_CONF.format(port=port, folder=folder))
    command = folder / "ssh"
    command.write_text(SSH.format(folder=folder))
    command.chmod(0o755)
    subprocess.run(stack.inside("mkdir", "-p", "/run/sshd"), check=True)
    serve = stack.inside("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd.conf"))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(serve, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + patiently(20)
        while not listens(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise StandError(f"sshd does not start: {(folder / 'log').read_text()}")
            time.sleep(0.02)
        yield f"qemu+ssh://root@127.0.0.1:{port}/system?command={command}"
    finally:
        # its id inside the stack; the process that we have is nsenter
        with contextlib.suppress(FileNotFoundError):
            inside = (folder / "sshd.pid").read_text().strip()
            subprocess.run(stack.inside("kill", inside), check=False)
        server.wait(patiently(20))
