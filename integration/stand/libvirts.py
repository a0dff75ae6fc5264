"""Two ways to have a private libvirt, with one interface.

``Embedded``: the driver inside this process.  Only this process can use it (libvirt locks the
root while it is open, until the process ends) and a process can have only one; after that the
process can open no other libvirt ("Missing URI parameter 'root'"; libvirt takes it for a daemon).

``Daemon``: a libvirtd of our own.  virsh, the ckptmgr command and this process use it at once.
As root it is the system driver, whose folders cannot be configured: this process moves into a
mount namespace of its own in which they are ours (``private_mounts``).  Otherwise it is the
session driver, with its folders in the workspace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

import libvirt

from ckptmgr.domain.connection import Connection, connect
from ckptmgr.errors import ConnectionFailed

from .patience import patiently
from .workspace import Workspace

# Without confinement that a container or chroot has no means for, and a log daemon that nobody
# started.
_UNPRIVILEGED_CONF = """\
namespaces = []
cgroup_controllers = []
security_driver = "none"
stdio_handler = "file"
"""

QEMU_CONF = f"""\
{_UNPRIVILEGED_CONF}user = "root"
group = "root"
remember_owner = 0
"""


def qemu_conf() -> str:
    """libvirt's ``qemu.conf`` for the user that we are.

    A driver that is not privileged refuses to start with another user in it.
    """
    return QEMU_CONF if os.geteuid() == 0 else _UNPRIVILEGED_CONF


LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 0
auth_unix_ro = "none"
auth_unix_rw = "none"
log_filters = "3:qemu 4:object 4:util"
"""

# libvirt's own folders as compiled in, and where they are in the stand
SYSTEM_FOLDERS = {
    "/etc/libvirt": "etc",
    "/var/lib/libvirt": "lib",
    "/var/cache/libvirt": "cache",
    "/var/log/libvirt": "log",
    "/run/libvirt": "run",
}


_private = False


class StandError(Exception):
    """This machine has no means for the stand; the message says which."""


class Stand(Protocol):
    """A private libvirt."""

    kind: str
    """embedded or daemon"""
    uri: str
    workspace: Workspace
    connection: Connection

    @property
    def handle(self) -> libvirt.virConnect:
        """libvirt's connection."""
        ...

    def pid_of(self, domain: str) -> int:
        """Process id of a running domain's QEMU."""
        ...

    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to reach this libvirt at `uri`.

        Raises StandError where another process cannot.
        """
        ...

    def virsh(self, *arguments: str, check: bool = True) -> str:
        """Run virsh against this libvirt and return what it printed."""
        ...

    def close(self) -> None:
        """Close the connection and end the libvirt."""
        ...


class Client:
    """What the tests do with a libvirt that they reach by its URI."""

    kind: str
    uri: str
    workspace: Workspace
    connection: Connection
    _pid_files: Path

    @property
    def handle(self) -> libvirt.virConnect:
        return self.connection.handle

    def pid_of(self, domain: str) -> int:
        # libvirt escapes the name as if the file's path were XML (7.0 to 11.3)
        name = escape(domain, {"'": "&apos;", '"': "&quot;"})
        return int((self._pid_files / f"{name}.pid").read_text())

    def environment(self) -> Mapping[str, str]:
        raise NotImplementedError

    def virsh(self, *arguments: str, check: bool = True) -> str:
        done = self.run(["virsh", "-q", "-c", self.uri, *arguments])
        if check and done.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def run(
        self, command: Sequence[str], *, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this libvirt; its output is text."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment(), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patiently(timeout),
            check=False,
        )


def embedded_root(workspace: Workspace) -> Path:
    """A new root for ``qemu:///embed?root=...``."""
    root = workspace.folder("r")
    (root / "etc").mkdir()
    (root / "etc/qemu.conf").write_text(qemu_conf())
    return root


class Embedded(Client):
    """``qemu:///embed?root=...`` in this process."""

    kind = "embedded"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.root = embedded_root(workspace)
        self.uri = f"qemu:///embed?root={self.root}"
        self._pid_files = self.root / "run/qemu"
        self.connection = connect(self.uri)

    def environment(self) -> Mapping[str, str]:
        raise StandError("an embedded libvirt is used by one process at a time")

    def close(self) -> None:
        self.connection.close()


class System(Client):
    """The system's own libvirt: in a host that is there for the tests alone."""

    kind = "system"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.uri = "qemu:///system"
        self._pid_files = Path("/run/libvirt/qemu")
        self.connection = connect(self.uri)

    def environment(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        self.connection.close()


def private_mounts() -> None:
    """Move this process into a mount namespace of its own; once, before it has threads.

    Nothing that is mounted later is seen outside, and all of it goes when the process ends.
    Raises StandError where that is not allowed.
    """
    global _private
    new_mount_namespace = 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mount_namespace) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise StandError(f"no mount namespace of our own: {reason}")
    _mount("--make-rprivate", "/")
    _private = True


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StandError(done.stderr.strip())


class Daemon(Client):
    """A libvirtd of our own: the system driver for root, else the session driver.

    For root, call ``private_mounts`` first.
    """

    kind = "daemon"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._folder = workspace.folder("d")
        self._environment: dict[str, str] = {}
        self._mounted: list[Path] = []
        self._made: list[Path] = []
        if os.geteuid() == 0:
            self._as_system()
        else:
            self._as_session()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self._end()
            raise

    def _as_system(self) -> None:
        if not _private:
            raise StandError("private_mounts() was not called, or has failed")
        for name, ours in SYSTEM_FOLDERS.items():
            real, mounted = Path(name), self._folder / ours
            mounted.mkdir()
            if not real.exists():
                real.mkdir(parents=True)
                self._made.append(real)
            _mount("--bind", mounted, real)
            self._mounted.append(real)
        self._configuration = self._folder / "etc"
        self._socket = self._folder / "run/libvirt-sock"
        self._pid_files = self._folder / "run/qemu"
        (self._configuration / "qemu.conf").write_text(qemu_conf())
        self.uri = "qemu:///system"

    def _as_session(self) -> None:
        for name in ("CONFIG", "CACHE", "RUNTIME", "STATE", "DATA"):
            folder = self._folder / name.lower()
            folder.mkdir(mode=0o700)
            self._environment[f"XDG_{name}_{'DIR' if name == 'RUNTIME' else 'HOME'}"] = str(folder)
        self._configuration = self._folder / "config/libvirt"
        self._configuration.mkdir()
        self._socket = self._folder / "runtime/libvirt/libvirt-sock"
        self._pid_files = self._folder / "runtime/libvirt/qemu/run"
        (self._configuration / "qemu.conf").write_text(qemu_conf())
        # libvirt's client finds the session's socket through this process's environment
        os.environ.update(self._environment)
        self.uri = "qemu:///session"

    @property
    def socket_uri(self) -> str:
        """A URI that is good for every process on this machine, whatever its mounts."""
        driver = self.uri.rpartition("/")[2]
        return f"qemu+unix:///{driver}?socket={self._socket}"

    @property
    def pid(self) -> int:
        """Process id of the libvirtd.  Raises StandError if it was stopped."""
        if self._process is None:
            raise StandError("libvirtd is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the libvirtd (again) and connect to it."""
        configuration = self._configuration / "libvirtd.conf"
        configuration.write_text(LIBVIRTD_CONF)
        with (self._folder / "libvirtd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["libvirtd", "-f", configuration, "--pid-file", self._folder / "libvirtd.pid"],
                env={
                    **os.environ,
                    **self._environment,
                    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workspace.record(self._process.pid)
        deadline = time.monotonic() + patiently(60)
        while True:
            # The socket is there a moment before it is listened to.
            with contextlib.suppress(ConnectionFailed):
                if self._socket.exists():
                    self.connection = connect(self.uri)
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                log_text = (self._folder / "libvirtd.log").read_text(errors="replace")
                raise StandError(f"libvirtd does not start: {log_text[-500:]}")
            time.sleep(0.02)

    def stop(self, *, kill: bool = False) -> None:
        """End the libvirtd, which leaves its machines running; `kill`: with SIGKILL."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(patiently(10))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._socket.unlink(missing_ok=True)

    def environment(self) -> Mapping[str, str]:
        return self._environment

    def close(self) -> None:
        """Close the connection, end the daemon and put the folders back."""
        try:
            self.connection.close()
        except libvirt.libvirtError as error:
            print(f"closing {self.uri}: {error}", file=sys.stderr)
        self._end()

    def _end(self) -> None:
        self.stop()
        for real in self._mounted:
            subprocess.run(["umount", "--lazy", real], check=False)
        for real in self._made:
            with contextlib.suppress(OSError):
                real.rmdir()
