"""Digests of the blocks that one layer holds: one image file without its backing file.

The file, all integers little-endian:

    length
        18  the line "ckptmgr digests 1" and a newline
      32 n  digests of the n data blocks (block.py), in ascending order of the blocks
         d  numbers of the data blocks: 64-bit roaring bitmap, portable format
         z  numbers of the zero blocks, likewise
        36  block size (4 bytes), size of the disk in bytes, n, d, z (8 bytes each)
        32  SHA-256 of everything before

It is written from front to back and its memory is that of the two bitmaps, whatever the size of
the disk.  A block that is in neither set is not of this layer; in the lowest one it is zero.  All
of the file is checked when it is opened.  It is read with pread, not mapped: a file that is cut off
or cannot be read while it is in use is an error then, and not the end of the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyroaring import AbstractBitMap64, BitMap64

from ..dirtymap import SIZE_MAX
from ..errors import RepositoryDamaged
from ..store import files
from .block import BLOCK, DIGEST_LENGTH, ZERO, block_count
from .failure import failing, of_the_repository

MAGIC = b"ckptmgr digests 1\n"

_TRAILER = struct.Struct("<IQQQQ")
_AT_ONCE = 1 << 16  # bytes of digests that are written, or read ahead, at once
_CHECKED_AT_ONCE = 1 << 20


class DigestWriter:
    """Writes the digests of a layer of a disk of `size` bytes, blocks ascending.

    Raises RepositoryFailed, and ValueError for blocks that are out of order or beyond the size.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self._end = block_count(size)
        self._next = 0
        self._data = BitMap64()
        self._zero = BitMap64()
        self._buffer = bytearray()
        self._sum = hashlib.sha256()
        with of_the_repository():
            self._output = files.Output(path)
        try:
            self._append(MAGIC)
        except BaseException:
            self.abandon()
            raise

    def add(self, block: int, digest: bytes) -> None:
        """The layer holds `block` with this digest; ZERO: as zeroes."""
        if digest == ZERO:
            self.zero(block, 1)
            return
        if len(digest) != DIGEST_LENGTH:
            raise ValueError(f"{len(digest)} bytes are not a digest")
        self._pass(block, 1)
        self._data.add(block)
        self._buffer += digest
        if len(self._buffer) >= _AT_ONCE:
            self._flush()

    def extend(self, first: int, digests: Sequence[bytes]) -> None:
        """`add` for consecutive blocks from `first`, all of which are data or all zeroes."""
        if not any(digests):
            self.zero(first, len(digests))
            return
        run = b"".join(digests)
        if len(run) != len(digests) * DIGEST_LENGTH:
            raise ValueError("not all of these are digests")
        self._pass(first, len(digests))
        self._data.add_range(first, first + len(digests))
        self._buffer += run
        if len(self._buffer) >= _AT_ONCE:
            self._flush()

    def zero(self, first: int, count: int) -> None:
        """The layer holds `count` blocks from `first` as zeroes."""
        if count > 0:
            self._pass(first, count)
            self._zero.add_range(first, first + count)

    def close(self) -> None:
        """Write the sets and the trailer; the content is then durable."""
        self._flush()
        for held in (self._data, self._zero):
            held.run_optimize()
        data, zero = self._data.serialize(), self._zero.serialize()
        sizes = (BLOCK, self.size, len(self._data), len(data), len(zero))
        for part in (data, zero, _TRAILER.pack(*sizes)):
            self._append(part)
        self._append(self._sum.digest())
        with of_the_repository():
            self._output.close()

    @property
    def sha256(self) -> str:
        """SHA-256 of the file as hexadecimal digits, once it is closed."""
        return self._sum.hexdigest()

    def abandon(self) -> None:
        """Remove the file."""
        self._output.abandon()

    def _pass(self, first: int, count: int) -> None:
        if not self._next <= first <= first + count <= self._end:
            raise ValueError(f"{count} blocks from {first} are out of order or beyond the disk")
        self._next = first + count

    def _flush(self) -> None:
        if self._buffer:
            self._append(bytes(self._buffer))
            self._buffer.clear()

    def _append(self, part: bytes) -> None:
        self._sum.update(part)
        with of_the_repository():
            self._output.append(part)


class Digests:
    """The digests of a layer, from their file.

    size -- of the disk in bytes
    data -- the blocks that the layer holds with data
    zero -- the blocks that it holds as zeroes
    sha256 -- of the file, as hexadecimal digits

    Raises RepositoryDamaged for anything that `DigestWriter` cannot have written or that is not
    there, RepositoryFailed if it cannot be read.  To be closed, as a context manager or by `close`.
    """

    size: int
    data: AbstractBitMap64
    zero: AbstractBitMap64
    sha256: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ahead = b""
        self._ahead_from = 0
        with failing(path, "cannot be read"):
            try:
                self._descriptor = files.open_regular(path)
            except FileNotFoundError:
                raise RepositoryDamaged(f"the digests {path} are missing") from None
        try:
            with failing(path, "cannot be read"):
                self._check()
        except BaseException:
            self.close()
            raise

    def find(self, block: int) -> bytes | None:
        """The digest of `block`, ZERO, or None: it is not of this layer.

        Blocks asked for in ascending order are read ahead.  Raises RepositoryFailed.
        """
        if block in self.data:
            return self._digests(self.data.rank(block) - 1, 1)
        return ZERO if block in self.zero else None

    def of(self, first: int, count: int) -> list[bytes | None]:
        """`find` for each of `count` blocks from `first`.  Raises RepositoryFailed."""
        if not self.data.contains_range(first, first + count):
            return [self.find(block) for block in range(first, first + count)]
        run = self._digests(self.data.rank(first) - 1, count)
        return [run[at : at + DIGEST_LENGTH] for at in range(0, len(run), DIGEST_LENGTH)]

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            with suppress(OSError):
                self.close()

    def _digests(self, index: int, count: int) -> bytes:
        """Those of `count` data blocks, from the one with that index on."""
        place, length = len(MAGIC) + index * DIGEST_LENGTH, count * DIGEST_LENGTH
        offset = place - self._ahead_from
        if not 0 <= offset <= len(self._ahead) - length:
            with failing(self.path, "cannot be read"):
                self._ahead = os.pread(self._descriptor, max(length, _AT_ONCE), place)
                if len(self._ahead) < length:
                    raise OSError(errno.EIO, "it has become shorter")
            self._ahead_from, offset = place, 0
        return self._ahead[offset : offset + length]

    def _check(self) -> None:
        length = os.fstat(self._descriptor).st_size
        body = length - DIGEST_LENGTH
        if body < len(MAGIC) + _TRAILER.size or self._read(0, len(MAGIC)) != MAGIC:
            raise self._damaged("they are cut off or something else")
        content = hashlib.sha256()
        for start in range(0, body, _CHECKED_AT_ONCE):
            part = self._read(start, min(_CHECKED_AT_ONCE, body - start))
            content.update(part)
        seal = self._read(body, DIGEST_LENGTH)
        whole = content.copy()
        whole.update(seal)
        if content.digest() != seal:
            raise self._damaged("their content does not match the digest at their end")
        self.sha256 = whole.hexdigest()
        trailer = body - _TRAILER.size
        block, self.size, count, data, zero = _TRAILER.unpack(self._read(trailer, _TRAILER.size))
        sets = len(MAGIC) + count * DIGEST_LENGTH
        if block != BLOCK or self.size > SIZE_MAX or sets + data + zero != trailer:
            raise self._damaged("what they say of themselves does not fit together")
        self.data = self._blocks(sets, data)
        self.zero = self._blocks(sets + data, zero)
        if len(self.data) != count or not self.data.isdisjoint(self.zero):
            raise self._damaged("their sets of blocks do not fit together")

    def _blocks(self, start: int, length: int) -> AbstractBitMap64:
        try:
            blocks = BitMap64.deserialize(self._read(start, length))
        except (ValueError, IndexError, struct.error) as error:
            raise self._damaged(f"a set of blocks cannot be read: {error}") from error
        if blocks and blocks.max() >= block_count(self.size):
            raise self._damaged("they speak of blocks beyond the disk")
        return blocks

    def _read(self, start: int, length: int) -> bytes:
        parts = []
        while length:
            part = os.pread(self._descriptor, length, start)
            if not part:
                raise self._damaged("they have become shorter")
            parts.append(part)
            start += len(part)
            length -= len(part)
        return b"".join(parts)

    def _damaged(self, why: str) -> RepositoryDamaged:
        return RepositoryDamaged(f"the digests {self.path} are damaged: {why}")


def effective(layers: Sequence[Digests], block: int) -> bytes:
    """The digest of what is seen at `block` through `layers`, the top one first.

    ZERO where no layer has the block, and beyond the end of a lower layer that is smaller than
    the ones above it.  The short last block of a lower layer counts as it is: its digest is that
    of the bytes which that layer has.
    """
    for layer in layers:
        if block >= block_count(layer.size):
            return ZERO
        found = layer.find(block)
        if found is not None:
            return found
    return ZERO


@dataclass(frozen=True)
class Held:
    """What of a layer is seen through the layers above it.

    index -- of the layer, 0 the top one
    data, zero -- the blocks for which it is the first layer that has them
    visible -- bytes from the disk's start that are seen of it: what is beyond the end of a
               smaller layer above is not, even where a larger one stands on that
    """

    index: int
    data: AbstractBitMap64
    zero: AbstractBitMap64
    visible: int


def held(layers: Sequence[Digests]) -> Iterator[Held]:
    """For every layer, top first, what is seen of it."""
    seen = BitMap64()
    visible = SIZE_MAX
    for index, layer in enumerate(layers):
        visible = min(visible, layer.size)
        data, zero = BitMap64(layer.data) - seen, BitMap64(layer.zero) - seen
        end = block_count(visible)
        for blocks in (data, zero):
            if blocks and blocks.max() >= end:
                blocks.remove_range(end, blocks.max() + 1)
        seen |= data
        seen |= zero
        yield Held(index, data, zero, visible)


def runs(blocks: AbstractBitMap64) -> Iterator[tuple[int, int]]:
    """Runs in a set of blocks, ascending: the first and how many."""
    # As in dirtymap.py: where a run starts and where it has ended, a container at a time.
    following = blocks.shift(1)
    for first, past in zip(blocks - following, following - blocks, strict=True):
        yield first, past - first


def block_set(found: Iterable[tuple[int, int]]) -> BitMap64:
    """The set of the blocks in runs of ``(first, count)``."""
    blocks = BitMap64()
    for first, count in found:
        blocks.add_range(first, first + count)
    return blocks
