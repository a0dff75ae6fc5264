"""Who has a block device open, and whether it is written.

QEMU's locks do not tell: a lock belongs to the node that was opened, and libvirt gives each QEMU a
``/dev`` with nodes of its own (``namespaces = ["mount"]``, the default of the system driver).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from pathlib import Path

log = logging.getLogger("ckptmgr")

_PROCESSES = "/proc"
_STATISTICS = Path("/sys/dev/block")
# Documentation/block/stat.rst
_WRITTEN = (6, 13)
"""Sectors written, sectors discarded."""

PASSING = 3.0
"""Seconds for who only looks at a device to close it, as udev does whenever it was written."""

_PAUSE = 0.05


def is_device(path: str | Path) -> bool:
    """Whether `path` is a block device."""
    try:
        return stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError:
        return False


def is_held(device: int, *, writing: bool = False) -> bool:
    """Whether another process has a block device open, and keeps it open.

    device -- its number, ``st_rdev``
    writing -- only who can write it counts

    Another user's processes can only be seen with privileges; a warning says so where they cannot.
    """
    deadline = time.monotonic() + PASSING
    held, unseen = _look(device, writing=writing)
    while held and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        held, unseen = _look(device, writing=writing)
    if unseen and not held:
        log.warning(
            "whether another user's program uses device %d:%d cannot be seen without privileges",
            os.major(device),
            os.minor(device),
        )
    return held


def _look(device: int, *, writing: bool) -> tuple[bool, bool]:
    """Whether a process has the device open, and whether one could not be looked into."""
    unseen = False
    for process in _names(_PROCESSES):
        if not process.isdigit() or int(process) == os.getpid():
            continue
        try:
            links = _descriptors(process)
        except PermissionError:
            unseen = True
            continue
        except OSError:
            continue  # it has ended
        if any(_opens(link, device, writing=writing) for link in links):
            return True, unseen
    return False, unseen


def _descriptors(process: str) -> list[Path]:
    """What a process has open.  Raises OSError.

    The first thread of one that was killed may be gone, and have nothing open any more, while
    another one still has to finish what it writes.
    """
    folder = Path(_PROCESSES, process)
    found = _names(folder / "fd")
    if found:
        return [folder / "fd" / name for name in found]
    links: list[Path] = []
    for thread in _names(folder / "task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            there = folder / "task" / thread / "fd"
            links += [there / name for name in _names(there)]
    return links


def _names(folder: str | Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _opens(link: Path, device: int, *, writing: bool) -> bool:
    try:
        # By name first: to ask about a file on a server that is gone would never return.
        if "/dev/" not in str(link.readlink()):
            return False
        if writing and not link.lstat().st_mode & stat.S_IWUSR:
            return False
        found = link.stat()
    except OSError:
        return False  # it was closed
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device


def is_mounted(path: str | Path) -> bool:
    """Whether the kernel itself uses a block device: mounted, or what another one is made of."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


class Watch:
    """Whether a block device is written from now on, by whomever.  Raises OSError."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._before = self._written()

    def is_disturbed(self) -> bool:
        """Whether it was written, or somebody has it open who can write it.

        What reads it on our behalf is to have ended.
        """
        number = Path(self.path).stat().st_rdev
        return self._written() != self._before or is_held(number, writing=True)

    def _written(self) -> list[str]:
        """How much of it was ever written, when all that is in memory is."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            number = os.fstat(descriptor).st_rdev
        finally:
            os.close(descriptor)
        name = f"{os.major(number)}:{os.minor(number)}"
        try:
            counters = (_STATISTICS / name / "stat").read_text(encoding="ascii").split()
        except OSError as error:
            log.info("device %s has no statistics: %s", self.path, error)
            return []
        return [counters[field] for field in _WRITTEN if field < len(counters)]
