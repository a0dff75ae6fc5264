"""Merging the images of several layers into one: which block comes from which, and the doing.

Driven by the digests: every block that is taken over is read and compared with its digest first, so
that damage stops the merge and is never handed on as sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import zstandard
from pyroaring import AbstractBitMap64, BitMap64

from ..errors import OperationFailed, RepositoryDamaged
from .block import BLOCK, ZERO, block_count, block_length, digest
from .copying import Source, read_blocks
from .digests import Digests, DigestWriter, held, runs
from .failure import failing
from .qcow2 import Qcow2Writer

WINDOW = 512
"""Blocks that are in memory at once."""

LEVEL = 3
"""Of zstd, its own default."""


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
        self._compressor = zstandard.ZstdCompressor(level=LEVEL) if compress else None
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
            found: dict[int, tuple[bytes, bytes]] = {}
            for take in merge.takes:
                blocks = take.data & window
                if blocks:
                    found |= self._read(layers[take.index], blocks, take.visible)
            for first, count in runs(merge.zero & window):
                found |= dict.fromkeys(range(first, first + count), (ZERO, b""))
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

    def _read(
        self, layer: Layer, blocks: AbstractBitMap64, visible: int
    ) -> dict[int, tuple[bytes, bytes]]:
        """Digest and content of blocks of a layer, as the merged one holds them."""
        found: dict[int, tuple[bytes, bytes]] = {}

        def consume(first: int, data: memoryview, digests: Sequence[bytes]) -> None:
            for index, told in enumerate(digests):
                number = first + index
                if told == ZERO or told != layer.digests.find(number):
                    raise _changed(layer, number)
                content = bytes(data[index * BLOCK : (index + 1) * BLOCK])
                found[number] = self._fitted(number, told, content, visible)

        def zero(first: int, count: int) -> None:
            raise _changed(layer, first)

        try:
            read_blocks(layer.source, runs(blocks), consume, zero)
        except OperationFailed as error:
            raise unreadable(layer.what, error) from error
        if len(found) != len(blocks):
            raise RepositoryDamaged(f"{layer.what} is smaller than its manifest says")
        return found

    def _fitted(self, number: int, told: bytes, data: bytes, visible: int) -> tuple[bytes, bytes]:
        """A block as long as the merged disk has it, with nothing of what was hidden."""
        length = block_length(self._size, number)
        seen = block_length(visible, number)
        if len(data) == length <= seen:
            return told, data
        data = data[: min(seen, length)].ljust(length, b"\0")
        return (digest(data), data) if any(data) else (ZERO, b"")

    def _append(self, found: dict[int, tuple[bytes, bytes]]) -> None:
        """Write consecutive blocks, each as its digest and content."""
        frames = {} if self._compressor is None else self._frames(found)
        order = sorted(found)
        kinds = {
            number: "zero" if found[number][0] == ZERO else "frame" if number in frames else "data"
            for number in order
        }
        with failing(self._path, "cannot be written"):
            for (kind, _), group in groupby(
                enumerate(order), key=lambda each: (kinds[each[1]], each[1] - each[0])
            ):
                numbers = [number for _, number in group]
                first = numbers[0]
                if kind == "zero":
                    self._image.zero(first, len(numbers))
                elif kind == "frame":
                    self._image.write_compressed(first, [frames[number] for number in numbers])
                else:
                    data = b"".join(found[number][1] for number in numbers)
                    self._image.write(first, memoryview(data))
        for number in order:
            self._digests.add(number, found[number][0])

    def _frames(self, found: dict[int, tuple[bytes, bytes]]) -> dict[int, bytes]:
        """The blocks that get smaller, compressed."""
        frames = {}
        for number, (_, data) in found.items():
            if len(data) == BLOCK and self._compressor is not None:
                frame = self._compressor.compress(data)
                if len(frame) < BLOCK:
                    frames[number] = frame
        return frames


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
