"""Reading the images of a chain without a QEMU program between the file and the data.

Only what `Qcow2Writer` writes is understood; whatever else a file may hold, by damage or by design,
is an error, and every block is compared with its digest by who reads it.  A restore that goes this
way copies as fast as the disk does, where qemu-nbd and its socket would cost as much again.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from pathlib import Path

import zstandard

from ..errors import RepositoryDamaged, StoreDamaged
from ..qcow2 import (
    COMPRESSED,
    COMPRESSION_TYPE,
    OFFSET,
    SECTOR,
    ZERO,
    ZSTD,
    Header,
    Malformed,
    read_header,
    unpack_table,
)
from ..store import files
from .batch import Batch, Chunk
from .block import BLOCK
from .digests import Digests, held, runs
from .failure import failing
from .pipeline import Pipeline
from .qcow2 import CLUSTER_BITS, CSIZE_SHIFT, ENTRIES
from .rate import REQUEST

_BUFFERS = 24
"""Of 1 MiB, between reading and writing."""

_TABLES = 16
"""L2 tables that are kept, of 64 KiB each: one has 512 MiB of the disk."""


class ImageFile:
    """The clusters of one image, without its backing file.

    size -- of the disk in bytes, which the image must have

    Raises RepositoryDamaged for a file that `Qcow2Writer` cannot have written, RepositoryFailed if
    it cannot be read.  To be closed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._looking = threading.Lock()
        self._local = threading.local()
        with failing(path, "cannot be read"):
            try:
                self._descriptor = files.open_regular(path)
            except (FileNotFoundError, StoreDamaged) as error:
                raise RepositoryDamaged(f"the image {path} is missing or is not a file") from error
        try:
            with failing(path, "cannot be read"):
                self._l1 = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> array[int]:
        try:
            header = read_header(self._descriptor)
        except Malformed as error:
            raise self._damaged(str(error)) from error
        if header is None or not _ours(header):
            raise self._damaged("its header is not one of ours")
        if header.size != self.size:
            raise self._damaged(f"it is of a disk of {header.size} bytes, and not of {self.size}")
        length = header.l1_length
        if length != -(-self.size // (ENTRIES * BLOCK)):
            raise self._damaged("its first table has another length than its size asks for")
        if header.l1_offset + length * 8 > os.fstat(self._descriptor).st_size:
            raise self._damaged("it was cut off")
        return unpack_table(self._read(header.l1_offset, length * 8))

    def fill(self, first: int, data: memoryview) -> None:
        """Read blocks that the image holds with data, from number `first` on.

        Raises RepositoryDamaged, RepositoryFailed.
        """
        with failing(self.path, "cannot be read"):
            extents = tuple(self._extents(first, len(data)))
        for start, length, entry in extents:
            part = data[start : start + length]
            with failing(self.path, f"cannot be read from offset {first * BLOCK + start} on"):
                if entry & COMPRESSED:
                    self._decompress(entry, part)
                else:
                    self._fill(part, entry & OFFSET)

    def _extents(self, first: int, length: int) -> Iterator[tuple[int, int, int]]:
        """``(start, length, entry)``: bytes that lie together in the file."""
        begin, entry, expected = 0, 0, -1
        for start in range(0, length, BLOCK):
            found = self._entry(first + start // BLOCK)
            if found != expected:
                if start:
                    yield begin, start - begin, entry
                begin, entry = start, found
            # A compressed cluster stands for itself.
            expected = -1 if found & COMPRESSED else found + BLOCK
        yield begin, length - begin, entry

    def _entry(self, block: int) -> int:
        number, index = divmod(block, ENTRIES)
        with self._looking:
            table = self._tables.get(number)
            if table is None:
                offset = self._l1[number] & OFFSET
                if not offset:
                    raise self._damaged(f"it does not hold block {block}")
                table = self._tables[number] = unpack_table(self._read(offset, BLOCK))
                while len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
        if not table[index] & (COMPRESSED | OFFSET) or (
            table[index] & ZERO and not table[index] & COMPRESSED
        ):
            raise self._damaged(f"it does not hold block {block}")
        return table[index]

    def _fill(self, part: memoryview, offset: int) -> None:
        while part:
            done = os.preadv(self._descriptor, [part], offset)
            if not done:
                raise self._damaged("it was cut off")
            part, offset = part[done:], offset + done

    def _decompress(self, entry: int, part: memoryview) -> None:
        offset = entry & ((1 << CSIZE_SHIFT) - 1)
        sectors = (entry & ~(COMPRESSED | 1 << 63)) >> CSIZE_SHIFT
        frame = self._read(offset, (sectors + 1) * SECTOR - offset % SECTOR)
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:  # one a thread: they keep a state
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        try:
            content = decompressor.decompress(frame, max_output_size=BLOCK)
        except zstandard.ZstdError as error:
            raise self._damaged(f"a cluster cannot be decompressed: {error}") from error
        if len(content) != len(part):
            raise self._damaged("a cluster has another length")
        part[:] = content

    def _read(self, offset: int, length: int) -> bytes:
        found = bytearray(length)
        self._fill(memoryview(found), offset)
        return bytes(found)

    def _damaged(self, why: str) -> RepositoryDamaged:
        return RepositoryDamaged(f"the image {self.path} is damaged: {why}")

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ours(header: Header) -> bool:
    """Whether `Qcow2Writer` makes such headers."""
    kind = header.version, header.cluster_bits, header.encryption
    compressed = header.incompatible, header.compression
    return kind == (3, CLUSTER_BITS, 0) and compressed in ((0, 0), (COMPRESSION_TYPE, ZSTD))


@dataclass
class LayerChunk(Chunk):
    """Consecutive blocks of one layer; `layer` counts from the top one, 0."""

    layer: int = 0


Consume = Callable[[int, memoryview, Sequence[bytes], int], None]
"""Called with the first block, its bytes and those behind it, a digest each, and the layer."""


@dataclass(frozen=True)
class _Filling:
    """Reads each chunk where it is prepared, side by side with others."""

    images: Sequence[ImageFile]
    consume: Consume

    workers = 2

    def prepare(self, chunk: Chunk) -> list[bytes]:
        assert isinstance(chunk, LayerChunk)  # noqa: S101 -- read_images() puts no others
        self.images[chunk.layer].fill(chunk.first, chunk.data)
        return chunk.digests()

    def take(self, chunk: Chunk, prepared: list[bytes]) -> None:
        assert isinstance(chunk, LayerChunk)  # noqa: S101 -- as above
        self.consume(chunk.first, chunk.data, prepared, chunk.layer)

    def zero(self, first: int, count: int) -> None:
        raise AssertionError("zero blocks are not asked for")


def read_images(
    images: Sequence[ImageFile],
    digests: Sequence[Digests],
    consume: Consume,
    *,
    progress: Callable[[int], None] = lambda length: None,
) -> None:
    """Read every block that is seen with data through a chain of images of one size, ascending.

    images, digests -- of the layers, top first

    Raises RepositoryDamaged, RepositoryFailed, and what `consume` raises.
    """
    size = images[0].size
    layers = [
        [(first, count, each.index) for first, count in runs(each.data)] for each in held(digests)
    ]
    reader = _Filling(images, consume)
    with Pipeline(reader, progress, lambda: None, buffers=_BUFFERS) as pipeline:
        batch = Batch()
        for first, count, layer in merge(*layers):
            for begin in range(first, first + count, REQUEST):
                blocks = min(REQUEST, first + count - begin)
                length = min(blocks * BLOCK, size - begin * BLOCK)
                if not batch.fits(length):
                    pipeline.put(batch)
                    pipeline.check()
                    batch = Batch()
                while batch.buffer is None:
                    batch.buffer = pipeline.buffer()
                    if batch.buffer is None:
                        pipeline.wait()
                batch.items.append(LayerChunk(begin, *batch.room(length), layer))
        pipeline.put(batch)
