"""QEMU's locks on image files: asked for, and never taken.

block/file-posix.c: byte 100 + n is locked by whoever uses permission n, byte 200 + n by whoever
does not share it.  Of block devices the locks do not tell all; see `devices`.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from .devices import is_held

_PERMISSIONS = 64
"""As many as enum BlockPermission can have."""

_USED = (100, _PERMISSIONS)
_UNSHARED = (200, _PERMISSIONS)
_USED_FOR_WRITING = (101, 1)  # BLK_PERM_WRITE

_FLOCK = struct.Struct("hhqqi4x")


def in_use(descriptor: int) -> bool:
    """Whether a QEMU program has an image open, for whatever; `descriptor` is open for writing.

    Of a block device: whether any program has it open.
    """
    if any(_locked(descriptor, *where) for where in (_USED, _UNSHARED)):
        return True
    device = _device(descriptor)
    return device is not None and is_held(device)


def is_being_written(path: str) -> bool:
    """Whether a QEMU program has a local image open for writing; False if it cannot be opened.

    Of a block device: whether any program has.
    """
    try:
        # O_NONBLOCK: a path may turn out to be a fifo.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if _locked(descriptor, *_USED_FOR_WRITING):
            return True
        device = _device(descriptor)
        return device is not None and is_held(device, writing=True)
    finally:
        os.close(descriptor)


def _device(descriptor: int) -> int | None:
    """The number of an open block device; None of anything else."""
    found = os.fstat(descriptor)
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def _locked(descriptor: int, start: int, length: int) -> bool:
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    except OSError:
        return False  # a file system without locks: QEMU does not lock there either
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
