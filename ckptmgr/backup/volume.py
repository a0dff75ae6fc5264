"""Writing a disk to a raw file or a block device.

An existing volume is cleared first, as holes where its storage has them, so that nothing of what
it held is left; and its first block, with the boot record and the partition table, is written last,
when all the rest is durable: a volume that is half written cannot be taken for a disk.  Until then
it begins with words that say so, in case nobody else could.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from .block import BLOCK
from .writeback import WriteBack

# linux/falloc.h
_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16

_AT_ONCE = 1 << 30
"""Bytes to clear with one call, so that a signal is not kept waiting."""

MARK = (
    b"ckptmgr: this volume is half written.  A restore to it is under way, or was interrupted; "
    b"what it held is gone.  Restore to it again.\n"
)
"""What a volume begins with until it is whole; the rest of its first block is zeroes."""

_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)


class NewFile:
    """A new sparse file of `size` bytes; raises OSError as the file system does.

    path -- of a file that must not be there
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        try:
            os.ftruncate(self._file, size)
        except OSError:
            self.abandon()
            raise
        self._write_back = WriteBack(self._file)

    def write(self, first: int, data: memoryview) -> None:
        """Blocks from number `first` on."""
        _write(self._file, data, first * BLOCK)
        self._write_back.reached(first * BLOCK)

    def close(self) -> None:
        """Make it durable."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def abandon(self) -> None:
        """Remove it, unless it was closed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)


class Volume:
    """An existing raw file or block device, which is to be cleared before it is written.

    size -- of the disk that is written to it, in bytes; a file is made as long if it is shorter

    Raises OSError as the file system does.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        block = stat.S_ISBLK(path.stat().st_mode)
        # O_EXCL: not a device that is mounted, or that another one is made of.
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if block else 0))
        self._size = size
        self._first = b""
        self._write_back = WriteBack(self._file)

    def clear(self) -> None:
        """From now on what it held is gone, and it says that it is half written."""
        end = os.lseek(self._file, 0, os.SEEK_END)
        mark = memoryview(MARK)[: min(end, self._size)]
        _write(self._file, mark, 0)
        os.fsync(self._file)
        clear(self._file, len(mark), end - len(mark))
        if end < self._size:
            os.ftruncate(self._file, self._size)
        os.fsync(self._file)

    def write(self, first: int, data: memoryview) -> None:
        """Blocks from number `first` on."""
        if first == 0:
            self._first, data, first = bytes(data[:BLOCK]), data[BLOCK:], 1
        _write(self._file, data, first * BLOCK)
        self._write_back.reached(first * BLOCK)

    def close(self) -> None:
        """Make it durable, and then what it begins with."""
        os.fsync(self._file)
        first = self._first or bytes(min(len(MARK), self._size))
        _write(self._file, memoryview(first), 0)
        os.fsync(self._file)
        self.abandon()

    def abandon(self) -> None:
        """Let go of it as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def clear(file: int, start: int, length: int) -> None:
    """Have a part of a file or device read as zeroes.  Raises OSError."""
    end = start + length
    while start < end:
        part = min(_AT_ONCE, end - start)
        if not any(_fallocate(file, mode | _KEEP_SIZE, start, part) for mode in _MODES):
            _write_zeroes(file, start, part)
        start += part


_MODES = (_PUNCH_HOLE, _ZERO_RANGE)


def _fallocate(file: int, mode: int, start: int, length: int) -> bool:
    """Whether fallocate(2) did it; False where it cannot be done that way.

    On block devices both modes write zeroes without sending them, or unmap where that is the same.
    """
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(file, mode, start, length) != 0:
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def _write_zeroes(file: int, start: int, length: int) -> None:
    zeroes = memoryview(bytes(16 * BLOCK))
    end = start + length
    while start < end:
        part = zeroes[: end - start]
        _write(file, part, start)
        start += len(part)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
