"""The folder of one test run, the processes that belong to it, and the reaping of both.

    /tmp/ckptmgr-ab12cd34/
      owner       whose run it is: "<pid> <start time> <boot id> <pid namespace>"
      processes   a line "<pid> <start time>" for each process that the run started
      ...         libvirt's folders, images, stores

Paths are short because a unix socket's path holds 107 characters.  A process is known by its id
*and* its start time, so that an id that was given out again is never mistaken for ours.

A run that is killed is cleared away at once by a guard: this file, run as a program, which waits
for the run's end and shares neither its process group nor its session.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "ckptmgr-"

_KINDS = ("libvirtd", "qemu-")
"""How the names begin of programs that a run leaves running when it is killed."""


def birth(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot; None if it has ended.

    It has not while one of its threads is left, which keeps its files open and locked: the first
    one may be a zombie long before (proc(5): state, num_threads).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    state, threads, started = fields[0], int(fields[17]), fields[19]
    return None if state in "ZX" and threads <= 1 else started


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    """Where process ids mean what they mean to us; /tmp may be shared with other containers."""
    return str(Path("/proc/self/ns/pid").readlink())


def _end(pid: int, started: str, seconds: float = 60) -> None:
    """Kill that very process and wait until it is gone."""
    deadline = time.monotonic() + seconds
    while birth(pid) == started and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class Workspace:
    """The folder of one run.

    Use as a context manager: on the way out every process that was recorded is ended and the
    folder is removed, whatever happened.
    """

    def __init__(self, parent: Path | None = None, *, guarded: bool = True) -> None:
        """Make the folder, in `parent` or the temporary directory.

        guarded -- what the run leaves is cleared away at once if it is killed, and not only by
            the next
        """
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # a QEMU that runs as another user has to reach its images
        self.path.chmod(0o755)
        owner = os.getpid()
        (self.path / "owner").write_text(f"{owner} {birth(owner)} {_boot()} {_namespace()}\n")
        self._next = 0
        self._guard = _guard(self.path) if guarded else None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def folder(self, name: str) -> Path:
        """A new folder of the run, its name beginning with `name`."""
        self._next += 1
        path = self.path / f"{name}{self._next}"
        path.mkdir()
        return path

    def record(self, pid: int) -> None:
        """Remember that this run started process `pid`."""
        started = birth(pid)
        if started is not None:
            with (self.path / "processes").open("a") as file:
                file.write(f"{pid} {started}\n")

    def running(self) -> list[int]:
        """Ids of the recorded processes that have not ended."""
        return [pid for pid, _ in _running(self.path)]

    def close(self) -> None:
        """End what is still running and remove the folder."""
        _clear(self.path)
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None


def _guard(path: Path) -> subprocess.Popen[bytes]:
    """A process that clears `path` away when this one has ended, however that was."""
    return subprocess.Popen(
        [sys.executable, "-I", __file__, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _running(path: Path) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "processes").read_text().splitlines():
            pid, _, started = line.partition(" ")
            if birth(int(pid)) == started:
                yield int(pid), started


def _unrecorded(path: Path) -> Iterator[tuple[int, str]]:
    """Processes that libvirt started for this folder just before the run was killed.

    Only programs of libvirt and QEMU count, and only where their command line names the folder.
    """
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(process.name)
            ours = (process / "comm").read_text().startswith(_KINDS)
            started = birth(pid)
            command = (process / "cmdline").read_bytes()
            if ours and started is not None and os.fsencode(path) + b"/" in command:
                yield pid, started


def _clear(path: Path) -> None:
    # a daemon first, so that it starts no others meanwhile
    for found in (_running, _unrecorded):
        for pid, started in list(found(path)):
            _end(pid, started)
    shutil.rmtree(path, ignore_errors=True)


def reap(parent: Path | None = None) -> list[Path]:
    """Clear the workspaces of earlier runs that were killed; returns what was removed."""
    removed = []
    for path in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            pid, started, boot, namespace = (path / "owner").read_text().split()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        if boot != _boot():
            shutil.rmtree(path, ignore_errors=True)
        elif namespace == _namespace() and birth(int(pid)) != started:
            _clear(path)
        else:
            continue
        removed.append(path)
    return removed


if __name__ == "__main__":
    # until every end of the pipe that the run holds is closed
    sys.stdin.buffer.read()
    _clear(Path(sys.argv[1]))
