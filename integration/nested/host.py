"""A virtual host: a QEMU of ours with Debian, libvirt and a /dev/kvm in it, reached by ssh.

It is reached through a port of 127.0.0.1 with a key of its own, is on no network otherwise, writes
to an overlay in the run's folder, and ends with the process that started it, however that ends.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from integration.ports import free_port
from integration.stacks.build import PAUSE, TRIES
from integration.stand import StandError, Workspace
from integration.stand.accel import domain_type
from integration.stand.patience import patiently

CHECKOUT = Path(__file__).parents[2]
TREE = "/opt/ckptmgr"
"""Where the checkout is in a host; what the image was built for."""

LEFT_OUT = (".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")

BOOT_SECONDS = 300
"""Five times and more what it takes on two cores that do nothing else."""

# Whatever happens to us, even SIGKILL.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")


@dataclass(frozen=True)
class Image:
    """The image of a host, in the cache; it is not taken away while this object is held."""

    folder: Path
    hold: TextIO

    @classmethod
    def get(cls) -> Image:
        """The image for this checkout; built if it is not there.  Minutes then, and network.

        Raises StandError where that fails; why has been printed then.
        """
        build = [*_WITH_US, str(CHECKOUT / "vagrant/build-image.sh")]
        for again in reversed(range(TRIES)):
            done = subprocess.run(
                build, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode == 0:
                break
            if not again:
                raise StandError("the image of the host cannot be built")
            time.sleep(PAUSE)
        folder = Path(done.stdout.strip())
        hold = folder.with_name(f"{folder.name}.lock").open()
        fcntl.flock(hold, fcntl.LOCK_SH)
        return cls(folder, hold)


@dataclass(frozen=True)
class Lan:
    """A cable between two hosts: datagrams through unix sockets in the run's folder.

    here, there -- names of the ends
    address -- of this end, with the length of the prefix
    """

    folder: Path
    here: str
    there: str
    address: str

    @property
    def arguments(self) -> list[str]:
        """What QEMU is given for this end."""
        ends = f"local.type=unix,local.path={self.folder}/{self.here}"
        ends += f",remote.type=unix,remote.path={self.folder}/{self.there}"
        mac = f"52:54:00:12:00:{int(self.address.partition('/')[0].rpartition('.')[2]):02x}"
        return [
            "-netdev",
            f"dgram,id=lan,{ends}",
            "-device",
            f"virtio-net-pci,netdev=lan,mac={mac}",
        ]


class Host:
    """A running host.  Use as a context manager, or ``close`` it."""

    def __init__(
        self,
        workspace: Workspace,
        image: Image,
        name: str = "host",
        *,
        memory: int = 3072,
        processors: int = 2,
        lan: Lan | None = None,
    ) -> None:
        """Start the host; ``wait`` until it can be used.

        memory -- MiB
        """
        self.name = name
        self.image = image
        self.lan = lan
        self._workspace = workspace
        self._folder = workspace.folder("h")
        self._port = free_port()
        self._ssh: subprocess.Popen[bytes] | None = None
        key = self._folder / "key"
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key])
        overlay = self._folder / "disk.qcow2"
        backing = image.folder / "host.qcow2"
        _run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", overlay])
        accelerator = ["-accel", "tcg,thread=multi", "-cpu", "max"]
        # The processors that QEMU emulates share one TSC, but Linux believes no AMD with several of
        # them; and without a TSC to trust its KVM has none for guests either: they live on a clock
        # that is pieced together anew whenever one moves to the other processor.
        clock = "tsc=reliable"
        if domain_type() == "kvm":
            accelerator, clock = ["-accel", "kvm", "-cpu", "host"], ""
        # systemd puts it where sshd looks
        authorized = base64.b64encode(key.with_suffix(".pub").read_bytes()).decode()
        credential = f"io.systemd.credential.binary:ssh.authorized_keys.root={authorized}"
        kernel = f"root=LABEL=root rw console=ttyS0 net.ifnames=0 quiet systemd.hostname={name}"
        command = [
            *(*_WITH_US, "qemu-system-x86_64", "-name", name, "-machine", "q35", *accelerator),
            *("-m", str(memory), "-smp", str(processors), "-uuid", str(uuid.uuid4())),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self._folder}/console"),
            *("-kernel", f"{image.folder}/vmlinuz", "-initrd", f"{image.folder}/initrd"),
            # nothing inside is worth the time against Spectre: the machine is thrown away
            *("-append", f"{kernel} mitigations=off {clock}"),
            *("-drive", f"file={overlay},format=qcow2,if=virtio,cache=unsafe,discard=unmap"),
            *("-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{self._port}-:22"),
            *("-device", "virtio-rng-pci"),
            *("-smbios", f"type=11,value={credential}"),
            *([] if lan is None else lan.arguments),
        ]
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        workspace.record(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id of its QEMU."""
        return self._process.pid

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connection(self) -> list[str]:
        known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        ours = ["-i", f"{self._folder}/key", "-o", "IdentitiesOnly=yes", "-F", "none"]
        shared = ["-o", f"ControlPath={self._folder}/ssh", "-o", "LogLevel=ERROR"]
        alive = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=60"]
        return ["ssh", *known, *ours, *shared, *alive, "-p", str(self._port), "root@127.0.0.1"]

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it takes commands.

        seconds -- at most; by default BOOT_SECONDS, or more where this machine is slow
        Raises StandError if it ends, or has not booted then.
        """
        if seconds is None:
            seconds = max(BOOT_SECONDS, patiently(BOOT_SECONDS / 4))
        deadline = time.monotonic() + seconds
        master = [*_WITH_US, *self._connection(), "-M", "-N"]
        while True:
            with (self._folder / "ssh.log").open("wb") as log:
                self._ssh = subprocess.Popen(
                    master, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self._workspace.record(self._ssh.pid)
            while self._ssh.poll() is None:
                if (self._folder / "ssh").exists():
                    self._network()
                    return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            if self._process.poll() is not None:
                said = (self._folder / "qemu.log").read_text(errors="replace")
                raise StandError(f"{self.name} has ended: {said.strip()}")
            if time.monotonic() > deadline:
                said = (self._folder / "console").read_text(errors="replace")[-2000:]
                raise StandError(f"{self.name} has not booted in {seconds:.0f} s: {said}")
            time.sleep(0.5)

    def _network(self) -> None:
        if self.lan is not None:
            self.shell(f"ip address add {self.lan.address} dev eth1 && ip link set eth1 up")

    def shell(self, script: str, *, seconds: float = 600) -> str:
        """Run a script of sh as root and return what it prints.

        Raises StandError if it fails.
        """
        done = subprocess.run(
            [*self._connection(), script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            said = f"{done.stdout[-4000:]}{done.stderr[-4000:]}".strip()
            raise StandError(f"{self.name}: {script.splitlines()[0]}: {said}")
        return done.stdout

    def show(self, *command: str, seconds: float) -> int:
        """Run a command as root in the tree, let it print, and return its exit status.

        Raises subprocess.TimeoutExpired.
        """
        script = f"cd {TREE} && exec {shlex.join(command)} 2>&1"
        done = subprocess.run(
            [*self._connection(), script], stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )
        return done.returncode

    def interact(self) -> None:
        """A shell for a person, as root in the tree."""
        subprocess.run([*self._connection(), "-t", f"cd {TREE} && exec bash -l"], check=False)

    def push(self) -> None:
        """Put the checkout's files, as they are now, in place of what the host has of it."""
        names = [f"--exclude={name}" for name in LEFT_OUT]
        pack = subprocess.Popen(
            ["tar", "-C", str(CHECKOUT), *names, "-cz", "."],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        unpack = (
            f"mkdir -p {TREE} && cd {TREE}"
            " && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
            " && tar -xz --no-same-owner --warning=no-timestamp"
        )
        with pack:
            done = subprocess.run(
                [*self._connection(), unpack], stdin=pack.stdout, timeout=600, check=False
            )
        if pack.returncode or done.returncode:
            raise StandError(f"{self.name}: the tree cannot be copied")

    def pull(self, inside: str, folder: Path) -> None:
        """Copy a folder of the host's into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        pack = subprocess.run(
            [*self._connection(), f"tar -C {shlex.quote(inside)} -cz ."],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=600,
            check=True,
        )
        unpack = ["tar", "-C", str(folder), "-xz", "--no-same-owner"]
        subprocess.run(unpack, input=pack.stdout, check=True)

    def close(self) -> None:
        """End it; its disk is thrown away with the workspace."""
        for process in (self._ssh, self._process):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                process.wait()


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
