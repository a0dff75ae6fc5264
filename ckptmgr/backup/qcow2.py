"""Writing a qcow2 image from its first block to its last, in one pass.

The format is QEMU's docs/interop/qcow2.txt, version 3.  Blocks come in ascending order and clusters
are only ever appended, so memory stays the same however large the disk is, and so no QEMU program
stands between the data and the file.  The order in the file:

    cluster 0                       header, written last
    data clusters, and after every 8192 entries (512 MiB of the disk) the L2 table for them, and
    after every 32768 clusters (2 GiB of the file) the refcount block for them
    L1 table, the last refcount blocks, refcount table

What is not written stays unallocated: it is the backing file's, or zero where there is none.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from ..qcow2 import (
    COMPRESSED,
    COMPRESSION_TYPE,
    COPIED,
    NAME_MAX,
    SECTOR,
    ZERO,
    ZSTD,
    Header,
    pack_table,
)
from .block import BLOCK
from .writeback import WriteBack

CLUSTER_BITS = 16
ENTRIES = BLOCK // 8
"""Entries of an L2 table, and of a cluster of the L1 or the refcount table."""
_COUNTS = BLOCK // 2
"""Refcounts of 16 bits in a refcount block."""

CSIZE_SHIFT = 62 - (CLUSTER_BITS - 8)
"""In the entry of a compressed cluster: its sectors are above, its offset is below."""
LEVEL = 3
"""Of zstd, its own default."""


class Qcow2Writer:
    """A new qcow2 image with clusters of one block.

    path -- of a file that must not be there
    size -- virtual size in bytes, a multiple of 512
    backing -- name of the backing file, a qcow2 image, as the header is to have it; None: none
    compressed -- compressed clusters may be written, each a zstd frame

    Everything raises OSError as the file system does.  The image is whole, and durable, when
    `close` has returned; `abandon` removes it.
    """

    def __init__(
        self, path: Path, size: int, *, backing: str | None = None, compressed: bool = False
    ) -> None:
        if size < 0 or size % SECTOR:
            raise ValueError(f"{size} bytes cannot be the size of an image")
        self._name = os.fsencode(backing) if backing is not None else b""
        if len(self._name) > NAME_MAX:
            raise ValueError(f"{backing!r} is too long for the name of a backing file")
        self.path = path
        self.size = size
        self.backing = backing
        self._compressed = compressed
        self._free = 1  # the next cluster; 0 is the header's
        self._packing = 0  # where the next compressed cluster can go; 0: nowhere
        self._counts: dict[int, array[int]] = {}
        self._blocks: dict[int, int] = {}  # cluster of each refcount block that is written
        self._l1 = array("Q", bytes(8 * -(-size // (ENTRIES * BLOCK))))
        self._l2 = array("Q", bytes(BLOCK))
        self._table = -1  # which L2 table that is
        self._next = 0  # the first block that may come
        self._count(0, 1)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._write_back = WriteBack(self._file)

    # --- blocks ------------------------------------------------------------------------------

    def write(self, first: int, data: memoryview) -> None:
        """Blocks from number `first` on; only the disk's last one may be shorter than a block."""
        count = -(-len(data) // BLOCK)
        self._expect(first, count)
        start = self._allocate(count)
        _write(self._file, data, start * BLOCK)
        offset = start * BLOCK | COPIED
        self._map(first, array("Q", range(offset, offset + count * BLOCK, BLOCK)))

    def write_compressed(self, first: int, frames: Sequence[bytes]) -> None:
        """Blocks from number `first` on, each a zstd frame that is smaller than a block."""
        if not self._compressed:
            raise ValueError("the image is not one with compressed clusters")
        self._expect(first, len(frames))
        entries = array("Q")
        for frame in frames:
            offset = self._pack(len(frame))
            _write(self._file, memoryview(frame), offset)
            sectors = (offset + len(frame) - 1) // SECTOR - offset // SECTOR
            entries.append(offset | sectors << CSIZE_SHIFT | COMPRESSED)
        self._map(first, entries)

    def zero(self, first: int, count: int) -> None:
        """Blocks that read as zeroes, whatever the backing file has there."""
        self._expect(first, count)
        if not self._name:
            return
        while count:
            part = min(count, ENTRIES - first % ENTRIES)
            self._map(first, array("Q", [ZERO]) * part)
            first, count = first + part, count - part

    def _expect(self, first: int, count: int) -> None:
        if first < self._next or (first + count - 1) * BLOCK >= max(self.size, 1):
            raise ValueError(f"block {first} (and {count - 1} more) is not one that may come now")
        self._next = first + count

    def _map(self, first: int, entries: array[int]) -> None:
        while entries:
            table, index = divmod(first, ENTRIES)
            if table != self._table:
                self._end_table()
                self._table = table
            part = entries[: ENTRIES - index]
            self._l2[index : index + len(part)] = part
            first, entries = first + len(part), entries[len(part) :]

    def _end_table(self) -> None:
        if self._table < 0:
            return
        cluster = self._allocate(1)
        _write(self._file, memoryview(pack_table(self._l2)), cluster * BLOCK)
        self._l1[self._table] = cluster * BLOCK | COPIED
        self._l2 = array("Q", bytes(BLOCK))
        self._table = -1

    # --- clusters ----------------------------------------------------------------------------

    def _allocate(self, count: int) -> int:
        """The first of `count` new clusters."""
        first = self._free
        self._write_back.reached(first * BLOCK)
        self._free += count
        self._count(first, count)
        self._write_counts()
        return first

    def _pack(self, length: int) -> int:
        """Offset of `length` bytes for a compressed cluster; clusters are shared by several."""
        offset = self._packing
        room = -offset % BLOCK
        if length <= room:
            self._count(offset // BLOCK, 1)
        else:
            new = self._allocate(1) * BLOCK  # and counted once, for this one
            if room and offset + room == new:
                self._count(offset // BLOCK, 1)
            else:
                offset = new
        self._packing = offset + length
        return offset

    def _count(self, first: int, count: int) -> None:
        while count:
            window, index = divmod(first, _COUNTS)
            counts = self._counts.setdefault(window, array("H", bytes(BLOCK)))
            part = min(count, _COUNTS - index)
            if part == 1:
                counts[index] += 1
            else:
                counts[index : index + part] = array("H", [1]) * part
            first, count = first + part, count - part

    def _write_counts(self) -> None:
        """Write the refcount blocks that cannot change any more."""
        packing = (self._packing or self._free * BLOCK) // BLOCK
        settled = min(packing, self._free) // _COUNTS
        for window in [window for window in self._counts if window < settled]:
            cluster = self._free
            self._free += 1
            self._count(cluster, 1)
            self._blocks[window] = cluster
            _write(self._file, memoryview(pack_table(self._counts.pop(window))), cluster * BLOCK)

    # --- the end -----------------------------------------------------------------------------

    def close(self) -> int:
        """Finish the image and make it durable; returns the size of the file in bytes."""
        self._end_table()
        l1 = self._tables(self._l1)
        self._packing = 0
        table, clusters = self._finish_counts()
        _write(self._file, memoryview(self._header(l1, table, clusters)), 0)
        os.ftruncate(self._file, self._free * BLOCK)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        return self._free * BLOCK

    def abandon(self) -> None:
        """Remove the image; for one that was closed, there is nothing to do."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)

    def _tables(self, entries: array[int]) -> int:
        """Write a table of 64-bit entries in clusters of its own; returns the first of them."""
        count = max(1, -(-len(entries) // ENTRIES))
        first = self._allocate(count)
        _write(self._file, memoryview(pack_table(entries)), first * BLOCK)
        return first

    def _finish_counts(self) -> tuple[int, int]:
        """The last refcount blocks and their table: its first cluster and how many it has."""
        # They count themselves: as many of each as cover all clusters, themselves included.
        blocks, clusters = 0, 0
        while True:
            total = self._free + blocks + clusters
            windows = -(-total // _COUNTS)
            wanted = windows - len(self._blocks), -(-windows // ENTRIES)
            if wanted == (blocks, clusters):
                break
            blocks, clusters = wanted
        first = self._free
        self._free += blocks + clusters
        self._count(first, blocks + clusters)
        for number, window in enumerate(sorted(self._counts)):
            self._blocks[window] = first + number
            counts = memoryview(pack_table(self._counts[window]))
            _write(self._file, counts, (first + number) * BLOCK)
        table = first + blocks
        entries = array("Q", (self._blocks[window] * BLOCK for window in sorted(self._blocks)))
        _write(self._file, memoryview(pack_table(entries)), table * BLOCK)
        return table, clusters

    def _header(self, l1: int, table: int, clusters: int) -> bytes:
        header = Header(
            self.size,
            cluster_bits=CLUSTER_BITS,
            backing_file=self.backing,
            backing_format=None if self.backing is None else "qcow2",
            l1_length=len(self._l1),
            l1_offset=l1 * BLOCK,
            refcounts_offset=table * BLOCK,
            refcounts_length=clusters,
            incompatible=COMPRESSION_TYPE if self._compressed else 0,
            compression=ZSTD if self._compressed else 0,
        )
        return header.pack()


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
