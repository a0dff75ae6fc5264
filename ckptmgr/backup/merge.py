"""Merging the images of several layers into one: which block comes from which, and the doing.

Driven by the digests: every block that is taken over is read and compared with its digest first, so
that damage stops the merge and is never handed on as sound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import zstandard
from pyroaring import AbstractBitMap64, BitMap64

from ..errors import OperationFailed, RepositoryDamaged
from .batch import Chunk
from .block import BLOCK, ZERO, block_count, block_length, digest
from .copying import Source
from .digests import Digests, DigestWriter, held, runs
from .failure import failing
from .qcow2 import LEVEL, Qcow2Writer

WINDOW = 512
"""Blocks that are in memory at once."""


@dataclass(frozen=True)
class Take:
    """The blocks that come from one layer.

    index -- of the layer among those that are merged and, behind them, those below
    data -- the blocks
    visible -- bytes of the disk's start that are seen of that layer; what is beyond is zero
    """

    index: int
    data: AbstractBitMap64
    visible: int


@dataclass(frozen=True)
class Merge:
    """What the merged layer holds: `takes` with data, `zero` as zeroes."""

    size: int
    takes: tuple[Take, ...]
    zero: AbstractBitMap64


def merge(layers: Sequence[Digests], below: Sequence[Digests]) -> Merge:
    """What one layer holds that stands for `layers` on `below`, both top first.

    Where a layer that goes is smaller than the ones around it, what it hid of those below has to
    stay hidden: the merged layer holds that as zeroes.
    """
    size = layers[0].size
    takes = []
    seen, zero = BitMap64(), BitMap64()
    smallest = size
    for each in held(layers):
        takes.append(Take(each.index, each.data, each.visible))
        seen |= each.data
        zero |= each.zero
        smallest = each.visible
    seen |= zero
    reach = min(size, below[0].size) if below else 0
    if smallest < reach:
        hidden = BitMap64()
        hidden.add_range(block_count(smallest), block_count(reach))
        zero |= hidden - seen
        edge = smallest // BLOCK
        if smallest % BLOCK and edge not in seen:
            takes += _at_the_edge(len(layers), below, edge, smallest)
    return Merge(size, tuple(take for take in takes if take.data), zero)


def _at_the_edge(index: int, below: Sequence[Digests], edge: int, smallest: int) -> Iterator[Take]:
    """The block through which the end of the smallest layer goes, if it is data of one below."""
    for each in held(below):
        if edge in each.data:
            yield Take(index + each.index, BitMap64([edge]), min(smallest, each.visible))


@dataclass(frozen=True)
class Layer:
    """A layer that can be read.

    what -- names it in messages
    source -- the image by itself
    """

    what: str
    digests: Digests
    source: Source


@dataclass(frozen=True)
class Block:
    """A block as the merged layer holds it.

    frame -- its data, compressed; None: `data` has it as it is
    """

    digest: bytes
    data: bytes = b""
    frame: bytes | None = None

    @property
    def kind(self) -> str:
        """How the image is to hold it."""
        if self.digest == ZERO:
            return "zero"
        return "data" if self.frame is None else "frame"


class _Taking:
    """A `Reader` that takes blocks of a layer, each compared with its digest.

    size -- of the merged disk, visible -- bytes of it that are seen of the layer
    """

    def __init__(self, layer: Layer, size: int, visible: int, *, compress: bool) -> None:
        self.found: dict[int, Block] = {}
        self._layer = layer
        self._size = size
        self._visible = visible
        self._compress = compress
        self._local = threading.local()

    @property
    def workers(self) -> int:
        """Threads that prepare."""
        return 2 if self._compress else 1

    def prepare(self, chunk: Chunk) -> list[Block]:
        """The blocks of a chunk, with the digests of what was read; by several threads."""
        return [
            self._block(number, told, data)
            for told, (number, data) in zip(chunk.digests(), chunk.blocks(), strict=True)
        ]

    def take(self, chunk: Chunk, prepared: list[Block]) -> None:
        """Compare them, in order, and make them fit."""
        for number, block in enumerate(prepared, chunk.first):
            if block.digest == ZERO or block.digest != self._layer.digests.find(number):
                raise _changed(self._layer, number)
            self.found[number] = self._fitted(number, block)

    def zero(self, first: int, count: int) -> None:
        """There should have been data."""
        raise _changed(self._layer, first)

    def _block(self, number: int, told: bytes, data: memoryview) -> Block:
        whole = len(data) == BLOCK == min(self._length(number), self._seen(number))
        if self._compress and whole and told != ZERO:
            frame = self._compressor.compress(data)
            if len(frame) < BLOCK:
                return Block(told, frame=frame)
        return Block(told, bytes(data))

    @property
    def _compressor(self) -> zstandard.ZstdCompressor:
        found: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if found is None:  # one a thread: they keep a state
            found = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL)
        return found

    def _fitted(self, number: int, block: Block) -> Block:
        """A block as long as the merged disk has it, with nothing of what was hidden."""
        length, seen = self._length(number), self._seen(number)
        if block.frame is not None or len(block.data) == length <= seen:
            return block
        data = block.data[: min(seen, length)].ljust(length, b"\0")
        return Block(digest(data), data) if any(data) else Block(ZERO)

    def _length(self, number: int) -> int:
        return block_length(self._size, number)

    def _seen(self, number: int) -> int:
        return block_length(self._visible, number)


class MergedWriter:
    """Writes the image and the digests of a merge; whole and durable after `close`.

    backing -- name of the backing file, None without one
    compress -- write what gets smaller as zstd

    Raises RepositoryFailed, and RepositoryDamaged for a block that is not what its digest says.
    """

    def __init__(
        self, image: Path, digests: Path, size: int, *, backing: str | None, compress: bool
    ) -> None:
        self._path = image
        self._size = size
        self._compress = compress
        with failing(image, "cannot be written"):
            self._image = Qcow2Writer(image, size, backing=backing, compressed=compress)
        try:
            self._digests = DigestWriter(digests, size)
        except BaseException:
            self._image.abandon()
            raise

    def write(self, merge: Merge, layers: Mapping[int, Layer]) -> None:
        """Write all of `merge`, whose takes are of `layers`."""
        everything = BitMap64(merge.zero)
        for take in merge.takes:
            everything |= take.data
        for window in _windows(everything):
            found: dict[int, Block] = {}
            for take in merge.takes:
                blocks = take.data & window
                if blocks:
                    found |= self._read(layers[take.index], blocks, take.visible)
            for first, count in runs(merge.zero & window):
                found |= dict.fromkeys(range(first, first + count), Block(ZERO))
            self._append(found)

    def close(self) -> int:
        """Make both files whole and durable; returns the size of the image file in bytes."""
        with failing(self._path, "cannot be written"):
            size = self._image.close()
        self._digests.close()
        return size

    def abandon(self) -> None:
        """Remove both files."""
        self._image.abandon()
        self._path.unlink(missing_ok=True)
        self._digests.abandon()

    def _read(self, layer: Layer, blocks: AbstractBitMap64, visible: int) -> dict[int, Block]:
        """Blocks of a layer, as the merged one holds them."""
        taking = _Taking(layer, self._size, visible, compress=self._compress)
        try:
            layer.source.read(runs(blocks), taking)
        except OperationFailed as error:
            raise unreadable(layer.what, error) from error
        if len(taking.found) != len(blocks):
            raise RepositoryDamaged(f"{layer.what} is smaller than its manifest says")
        return taking.found

    def _append(self, found: dict[int, Block]) -> None:
        """Write blocks in the order of the disk."""
        order = sorted(found)
        with failing(self._path, "cannot be written"):
            for (kind, _), group in groupby(
                enumerate(order), key=lambda each: (found[each[1]].kind, each[1] - each[0])
            ):
                numbers = [number for _, number in group]
                first = numbers[0]
                if kind == "zero":
                    self._image.zero(first, len(numbers))
                elif kind == "frame":
                    frames = [found[number].frame or b"" for number in numbers]
                    self._image.write_compressed(first, frames)
                else:
                    data = b"".join(found[number].data for number in numbers)
                    self._image.write(first, memoryview(data))
        for number in order:
            self._digests.add(number, found[number].digest)


def _windows(blocks: AbstractBitMap64) -> Iterator[BitMap64]:
    """The parts of the disk, of WINDOW blocks each, in which there are any of `blocks`."""
    first = next(iter(blocks), None)
    while first is not None:
        start = first - first % WINDOW
        window = BitMap64()
        window.add_range(start, start + WINDOW)
        yield window
        first = next(blocks.iter_equal_or_larger(start + WINDOW), None)


def unreadable(what: str, error: OperationFailed) -> RepositoryDamaged:
    """The error for an image that QEMU's programs cannot read."""
    return RepositoryDamaged(
        f"{what} cannot be read: {error.message}",
        hint="`ckptmgr verify` names all that is affected",
    )


def _changed(layer: Layer, number: int) -> RepositoryDamaged:
    return RepositoryDamaged(
        f"{layer.what} is damaged: its bytes from {number * BLOCK} on do not match their digest",
        hint="`ckptmgr verify` names all that is affected",
    )
