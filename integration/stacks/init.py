"""Process 1 of a running stack; executed as a program, in mount and pid namespaces of its own.

It mounts the stack's root, moves into it and does what it is told, a line each way:

                       ->  ready 4711           (its process id outside)
    start              ->  started              or: failed <why>
    start --listen     ->  started              with these arguments of libvirtd
    stop 15            ->  stopped

It ends when its standard input does, that is, with the process that holds the other end, however
that ends; and with process 1 the kernel ends every other process of the stack, and then its mounts
are gone, too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
SOCKET = Path("/run/libvirt/libvirt-sock")
START, STOP = 120, 60
"""Seconds in which libvirtd has to start, and to end."""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def enter(
    lower: Path, folder: Path, shared: Path, devices: list[str], programs: list[Path]
) -> None:
    """Mount the root and make it this process's.

    lower -- the release; stays as it is
    folder -- of this run of the stack: root, changes, and libvirt's own folders
    shared -- has the same path inside
    devices -- further nodes for /dev, such as kvm
    programs -- folders of this machine for ``_machine``
    """
    root, changes = folder / "root", folder / "changes"
    _mount("-t", "tmpfs", "stack", changes)
    (changes / "upper").mkdir()
    (changes / "work").mkdir()
    layers = f"lowerdir={lower},upperdir={changes}/upper,workdir={changes}/work"
    _mount("-t", "overlay", "-o", layers, "stack", root)
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    _make_devices(root / "dev", devices)
    for point in ("run", "tmp"):
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", root / point)
    for name in ("etc", "lib", "cache", "log", "run"):
        parent = name if name in ("etc", "run") else f"var/{name}"
        inside = root / parent / "libvirt"
        inside.mkdir(exist_ok=True)
        _mount("--bind", folder / name, inside)
    inside = root / shared.relative_to("/")
    inside.mkdir(parents=True, exist_ok=True)
    _mount("--bind", shared, inside)
    _machine(root, shared, programs)
    os.chroot(root)
    os.chdir("/")


def _make_devices(dev: Path, devices: list[str]) -> None:
    _mount("-t", "tmpfs", "-o", "mode=755", "dev", dev)
    os.umask(0)
    for name, minor in DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    for name in devices:
        os.mknod(dev / name, stat.S_IFCHR | 0o666, Path("/dev", name).stat().st_rdev)
    os.umask(0o022)
    (dev / "pts").mkdir()
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=666", "devpts", dev / "pts")
    (dev / "ptmx").symlink_to("pts/ptmx")
    (dev / "fd").symlink_to("/proc/self/fd")
    (dev / "shm").mkdir()
    _mount("-t", "tmpfs", "shm", dev / "shm")


def _machine(root: Path, shared: Path, programs: list[Path]) -> None:
    """A root in the root, with programs of this machine and the stack's images and libvirt.

    A hook of libvirt's is run inside, where the release has no Python that is new enough.
    """
    machine = root / "machine"
    machine.mkdir()
    _mount("-t", "tmpfs", "-o", "mode=755", "machine", machine)
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path("/", name).is_symlink():
            (machine / name).symlink_to(Path("/", name).readlink())
    inside = ("dev", "proc", "etc/libvirt", shared.relative_to("/"))
    sources = {machine / each: root / each for each in inside}
    sources |= {machine / each.relative_to("/"): each for each in programs}
    (machine / "tmp").mkdir(mode=0o1777)
    for point, source in sources.items():
        point.mkdir(parents=True, exist_ok=True)
        _mount("--bind", source, point)


def _listening() -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(os.fspath(SOCKET)) == 0


class Daemon:
    """The stack's libvirtd."""

    def __init__(self) -> None:
        self._pid: int | None = None

    def start(self, *arguments: str) -> str:
        """Start it, with further arguments, and wait for its socket."""
        SOCKET.unlink(missing_ok=True)
        log = Path("/var/log/libvirt/libvirtd.log")
        self._pid = os.posix_spawn(
            "/usr/sbin/libvirtd",
            ["libvirtd", *arguments],
            ENVIRONMENT,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            # what Python itself ignores
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            setsid=True,
        )
        deadline = time.monotonic() + START
        while not _listening():
            if self._ended() or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-500:]
                return f"failed {' '.join(said.split())}"
            time.sleep(0.02)
        return "started"

    def stop(self, number: int) -> str:
        """Send it a signal and wait for its end; it is killed if that takes long."""
        deadline = time.monotonic() + STOP
        while self._pid is not None and not self._ended():
            os.kill(self._pid, signal.SIGKILL if time.monotonic() > deadline else number)
            number = 0
            time.sleep(0.02)
        SOCKET.unlink(missing_ok=True)
        return "stopped"

    def _ended(self) -> bool:
        if self._pid is not None and os.waitpid(self._pid, os.WNOHANG)[0] == self._pid:
            self._pid = None
        return self._pid is None

    def reap(self) -> None:
        """Reap what has ended; orphans of the stack are children of this process."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._pid = None


def serve() -> None:
    """Obey until standard input ends."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    daemon = Daemon()
    while True:
        ready, _, _ = select.select([sys.stdin, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
            daemon.reap()
        if sys.stdin in ready:
            match os.read(sys.stdin.fileno(), 64).decode().split():
                case ["start", *arguments]:
                    print(daemon.start(*arguments), flush=True)
                case ["stop", number]:
                    print(daemon.stop(int(number)), flush=True)
                case _:
                    return


def main(settings: dict[str, Any]) -> None:
    """Run the stack described by `settings`: the arguments of ``enter``."""
    # /proc is still the outer one
    outside = Path("/proc/self").readlink()
    paths = {name: Path(settings[name]) for name in ("lower", "folder", "shared")}
    programs = [Path(each) for each in settings["programs"]]
    enter(**paths, devices=settings["devices"], programs=programs)
    print(f"ready {outside}", flush=True)
    serve()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
