"""Where a disk cannot be read.

QEMU's NBD server ends the connection at what it cannot read, where structured replies were
negotiated (7.2: "Failed to send reply: reading from file failed").  So all that is seen is that the
server has gone.  On a connection with simple replies it answers with the error, to that request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from errno import EIO
from typing import TYPE_CHECKING

import nbd

from .. import nbd as nbd_client
from ..errors import OperationFailed

if TYPE_CHECKING:
    from ..plan.steps import Server

Extent = tuple[int, int]
"""Offset and length in bytes."""

IsRead = Callable[[Extent], bool | None]
"""Whether all of an extent can be read; None: there is no time to see."""

SECTOR = 512

_SEARCH = 10.0
"""Seconds for finding the place: a disk that fails may try for long before it says so."""


def first_defect(server: Server, name: str, disk: str, asked: Iterable[Extent]) -> Extent | None:
    """The first sector in what was asked for that the server answers with EIO.

    More than a sector, where that takes too long to find.  None: there is no such, or the server
    cannot be asked any more.
    """
    extents = tuple(asked)
    if not extents:
        return None
    try:
        # To be dropped, and not said good-bye to: it may be waiting for its storage.
        handle = nbd_client.connect(
            server, name, disk, None, check=_gone, timeout=nbd_client.APPEAR_TIMEOUT
        )
        return search(_Attempts(handle, disk), extents)
    except (nbd.Error, OperationFailed):
        return None


def _gone() -> None:
    """What is not there now is not waited for."""
    raise OperationFailed("the server has gone")


def search(is_read: IsRead, extents: Iterable[Extent]) -> Extent | None:
    """The first sector that cannot be read, or what it must be in."""
    for extent in extents:
        seen = is_read(extent)
        if seen is None:
            return None
        if not seen:
            return _narrowed(is_read, extent)
    return None


def _narrowed(is_read: IsRead, extent: Extent) -> Extent:
    start, length = extent
    while length > SECTOR:
        half = -(-length // (2 * SECTOR)) * SECTOR
        seen = is_read((start, half))
        if seen is None:
            break
        if seen:
            start, length = start + half, length - half
        else:
            length = half
    return start, length


class _Attempts:
    """Reading for the sake of the answer, as long as there is time."""

    def __init__(self, handle: nbd.NBD, disk: str) -> None:
        self._handle = handle
        self._disk = disk
        self._until = time.monotonic() + _SEARCH
        self._rooms: dict[int, nbd.Buffer] = {}  # libnbd 1.14 never lets go of one

    def __call__(self, extent: Extent) -> bool | None:
        """Raises nbd.Error for any other failure than EIO."""
        start, length = extent
        if length not in self._rooms:
            self._rooms[length] = nbd.Buffer(length)
        room = self._rooms[length]
        cookie = self._handle.aio_pread(room, start)
        try:
            while not self._handle.aio_command_completed(cookie):
                nbd_client.poll(self._handle, self._until, self._disk)
        except OperationFailed:
            return None
        except nbd.Error as error:
            if error.errnum == EIO:
                return False
            raise
        return True


def unreadable(disk: str, extent: Extent) -> OperationFailed:
    """The error of a disk that cannot be read there."""
    start, length = extent
    where = f"at offset {start}"
    if length > SECTOR:
        where = f"between the offsets {start} and {start + length}"
    return OperationFailed(
        f"disk {disk} cannot be read {where}: Input/output error",
        hint="its storage fails there: see the log of the host's kernel. --disk backs up the other "
        "disks; what was backed up before can be restored",
    )
