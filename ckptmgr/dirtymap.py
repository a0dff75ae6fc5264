"""Dirty maps: exact sets of granules written between two points in time.

The file format, all integers little-endian:

    offset  length
         0      20  the line "ckptmgr dirty map 1" and a newline
        20       8  granularity in bytes, a power of two from 512
        28       8  size of the disk in bytes
        36       n  numbers of the dirty granules: 64-bit roaring bitmap, portable format
                    (github.com/RoaringBitmap/RoaringFormatSpec)
      36+n      32  SHA-256 of everything before

The portable format carries no check of its own and readers trust what it says about its
containers, hence the digest, which is compared before anything is parsed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pyroaring import AbstractBitMap64, BitMap64, FrozenBitMap64

from .errors import StoreDamaged

MAGIC = b"ckptmgr dirty map 1\n"
_HEADER = struct.Struct("<QQ")
_DIGEST_LENGTH = hashlib.sha256().digest_size

GRANULARITY_MIN = 512
"""QEMU's smallest (BDRV_SECTOR_SIZE)."""

SIZE_MAX = 2**63 - 1
"""QEMU's offsets are signed 64-bit."""


def granule_count(granularity: int, size: int) -> int:
    """Granules of a disk of `size` bytes; the last one may reach beyond it."""
    return -(-size // granularity)


@dataclass(frozen=True)
class DirtyMap:
    """The granules of a disk that were written: a value, never changed.

    granularity -- bytes per granule, a power of two from 512
    size -- of the disk in bytes; not always a multiple of the granularity
    granules -- their numbers; copied

    Raises ValueError for anything else, and for granules beyond the size.
    """

    granularity: int
    size: int
    granules: AbstractBitMap64

    def __post_init__(self) -> None:
        if self.granularity < GRANULARITY_MIN or self.granularity & (self.granularity - 1):
            raise ValueError(f"the granularity {self.granularity} is not a power of two from 512")
        if not 0 <= self.size <= SIZE_MAX:
            raise ValueError(f"{self.size} bytes cannot be the size of a disk")
        if self.granules and self.granules.max() >= granule_count(self.granularity, self.size):
            raise ValueError(f"granule {self.granules.max()} is beyond {self.size} bytes")
        object.__setattr__(self, "granules", FrozenBitMap64(self.granules))

    @classmethod
    def from_extents(
        cls, granularity: int, size: int, extents: Iterable[tuple[int, int]]
    ) -> DirtyMap:
        """The granules touched by `extents`, ``(start, length)`` in bytes, in any order.

        What lies beyond the size is left out.  Raises ValueError for negative numbers.
        """
        granules = BitMap64()
        for start, length in extents:
            if start < 0 or length < 0:
                raise ValueError(f"({start}, {length}) is not an extent")
            end = min(start + length, size)
            if length and start < end:
                granules.add_range(start // granularity, granule_count(granularity, end))
        return cls(granularity, size, granules)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written."""
        return not self.granules

    @property
    def dirty_bytes(self) -> int:
        """Bytes in dirty granules, the last one counted up to the size of the disk."""
        whole = len(self.granules) * self.granularity
        if self.granules:
            # Only a granule that reaches beyond the size has anything to take off.
            whole -= max(0, (self.granules.max() + 1) * self.granularity - self.size)
        return whole

    def extents(self) -> Iterator[tuple[int, int]]:
        """``(start, length)`` in bytes, ascending, not touching, within the size."""
        for first, past in self._runs():
            start = first * self.granularity
            yield start, min(past * self.granularity, self.size) - start

    def union(self, other: DirtyMap) -> DirtyMap:
        """What was written in either: see `union`."""
        return union((self, other))

    def refined(self, granularity: int) -> DirtyMap:
        """Exactly the same bytes in granules of `granularity`, which must not be coarser."""
        if granularity == self.granularity:
            return self
        if granularity > self.granularity:
            raise ValueError(f"granules of {granularity} bytes cannot say the same")
        factor = self.granularity // granularity
        count = granule_count(granularity, self.size)
        granules = BitMap64()
        for first, past in self._runs():
            granules.add_range(first * factor, min(past * factor, count))
        return DirtyMap(granularity, self.size, granules)

    def resized(self, size: int) -> DirtyMap:
        """The map for the disk after it was resized to `size`.

        Bytes that the disk did not have count as written: nothing is known of them.
        """
        if size == self.size:
            return self
        granules = BitMap64(self.granules)
        if size > self.size:
            granules.add_range(self.size // self.granularity, granule_count(self.granularity, size))
        else:
            granules.remove_range(
                granule_count(self.granularity, size), granule_count(self.granularity, self.size)
            )
        return DirtyMap(self.granularity, size, granules)

    def grown_from(self, size: int | None) -> DirtyMap:
        """The map of an interval at whose start the disk had `size` bytes (None: as many as now).

        Bitmaps that QEMU makes longer with their disk have clean bits for the new part, which
        was not there before.
        """
        if size is None or size >= self.size:
            return self
        return self.resized(size).resized(self.size)

    def serialize(self) -> bytes:
        """The file; equal maps give equal bytes."""
        granules = BitMap64(self.granules)
        granules.run_optimize()
        content = MAGIC + _HEADER.pack(self.granularity, self.size) + granules.serialize()
        return content + hashlib.sha256(content).digest()

    @classmethod
    def deserialize(cls, data: bytes) -> DirtyMap:
        """The map in a file.  Raises StoreDamaged for anything that `serialize` cannot give."""
        if not data.startswith(MAGIC):
            raise StoreDamaged("it is not a dirty map")
        content, digest = data[:-_DIGEST_LENGTH], data[-_DIGEST_LENGTH:]
        if hashlib.sha256(content).digest() != digest:
            raise StoreDamaged("its content does not match the digest at its end")
        body = len(MAGIC) + _HEADER.size
        try:
            granularity, size = _HEADER.unpack(content[len(MAGIC) : body])
            return cls(granularity, size, FrozenBitMap64.deserialize(content[body:]))
        except (ValueError, IndexError, struct.error) as error:
            raise StoreDamaged(f"it is not a dirty map: {error}") from error

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Runs of dirty granules, each as its first and the first after it."""
        # A run starts where the granule before is clean and ends where it is dirty; the sets of
        # both are computed a container at a time, so the cost is that of the runs.
        following = self.granules.shift(1)
        return zip(self.granules - following, following - self.granules, strict=True)


def union(maps: Iterable[DirtyMap]) -> DirtyMap:
    """What was written in any of `maps`, of which there is at least one.

    Of different granularities, the finest one is the result's, and says exactly the same bytes.
    Of different sizes, the largest one; the bytes that a smaller map does not have count as
    written.
    """
    parts = tuple(maps)
    if not parts:
        raise ValueError("a union of nothing has no granularity")
    granularity = min(part.granularity for part in parts)
    size = max(part.size for part in parts)
    granules = BitMap64()
    for part in parts:
        # Refined first: a coarse granule at the old end would otherwise reach too far.
        granules |= part.refined(granularity).resized(size).granules
    return DirtyMap(granularity, size, granules)
