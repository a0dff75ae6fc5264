"""One disk of a new restore point: its image and the digests of what that holds.

It is fed with blocks in the order of the disk, and keeps of them what differs from the point that
it stands on, by the digests: what was written with what was there before costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import zstandard
from pyroaring import BitMap64

from .batch import Chunk
from .block import BLOCK, ZERO
from .digests import Digests, DigestWriter, effective, held
from .failure import failing
from .qcow2 import LEVEL, Qcow2Writer

_SAME = "same"
_ZEROES = "zeroes"
_DATA = "data"
_FRAME = "frame"


class Run(NamedTuple):
    """What becomes of consecutive blocks.

    kind -- same (as below: nothing), zeroes, data, frame (compressed)
    at -- where in its chunk the first is
    frames -- compressed, one for each
    """

    kind: str
    at: int
    digests: list[bytes]
    frames: list[bytes]


class Layer:
    """A `Reader` that writes an image and its digests; whole and durable after `close`.

    image, digests -- the files to write
    size -- of the disk, in bytes
    backing -- the backing file as the image names it, lower -- its digests and those below it, top
               first; None and none for a full image
    compress -- write what gets smaller as zstd

    Raises RepositoryFailed where a file cannot be written.
    """

    def __init__(
        self,
        image: Path,
        digests: Path,
        size: int,
        *,
        backing: str | None = None,
        lower: Sequence[Digests] = (),
        compress: bool = False,
    ) -> None:
        self._path = image
        self._size = size
        self._lower = tuple(lower)
        self._compress = compress
        self._asking = threading.Lock()  # Digests read ahead
        self._local = threading.local()
        self._below = BitMap64()
        for part in held(self._lower):
            self._below |= part.data
        with failing(image, "cannot be written"):
            self._image = Qcow2Writer(image, size, backing=backing, compressed=compress)
        try:
            self._digests = DigestWriter(digests, size)
        except BaseException:
            self._image.abandon()
            raise

    # --- blocks ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Threads that prepare."""
        return 2 if self._compress else 1

    def prepare(self, chunk: Chunk) -> list[Run]:
        """See what differs, and compress it."""
        found = chunk.digests()
        kinds = self._kinds(chunk.first, found)
        frames: dict[int, bytes] = {}
        if self._compress:
            for index, kind in enumerate(kinds):
                data = chunk.data[index * BLOCK : (index + 1) * BLOCK]
                if kind == _DATA and len(data) == BLOCK:
                    frame = self._compressor.compress(data)
                    if len(frame) < BLOCK:
                        kinds[index], frames[index] = _FRAME, frame
        runs = []
        past = 0
        for kind, group in groupby(kinds):
            at, past = past, past + len(list(group))
            packed = [frames[each] for each in range(at, past)] if kind == _FRAME else []
            runs.append(Run(kind, at, found[at:past], packed))
        return runs

    def _kinds(self, first: int, found: list[bytes]) -> list[str]:
        """What becomes of each block from `first` on, uncompressed."""
        if not self._lower:
            return [_SAME if now == ZERO else _DATA for now in found]
        with self._asking:
            known = [effective(self._lower, first + index) for index in range(len(found))]
        return [
            _SAME if now == before else _ZEROES if now == ZERO else _DATA
            for now, before in zip(found, known, strict=True)
        ]

    @property
    def _compressor(self) -> zstandard.ZstdCompressor:
        found: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if found is None:  # one a thread: they keep a state
            found = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL)
        return found

    def take(self, chunk: Chunk, prepared: list[Run]) -> None:
        """Write what differs."""
        with failing(self._path, "cannot be written"):
            for kind, at, digests, frames in prepared:
                first = chunk.first + at
                if kind == _SAME:
                    continue
                if kind == _ZEROES:
                    self._image.zero(first, len(digests))
                elif kind == _FRAME:
                    self._image.write_compressed(first, frames)
                else:
                    data = chunk.data[at * BLOCK : (at + len(digests)) * BLOCK]
                    self._image.write(first, data)
                self._digests.extend(first, digests)

    def zero(self, first: int, count: int) -> None:
        """Keep what is zero now and was not below."""
        with failing(self._path, "cannot be written"):
            for begin, length in self._data_below(first, first + count):
                self._image.zero(begin, length)
                self._digests.zero(begin, length)

    def _data_below(self, first: int, past: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks from `first` up to `past` that are not zero below."""
        begin = end = -1
        for number in self._below.iter_equal_or_larger(first):
            if number >= past:
                break
            if number != end:
                if end > begin:
                    yield begin, end - begin
                begin = number
            end = number + 1
        if end > begin:
            yield begin, end - begin

    # --- the end -----------------------------------------------------------------------------

    def close(self) -> int:
        """Make both files whole and durable; returns the size of the image file in bytes."""
        with failing(self._path, "cannot be written"):
            size = self._image.close()
        self._digests.close()
        return size

    @property
    def digests_sha256(self) -> str:
        """SHA-256 of the file of digests as hexadecimal digits, once it is closed."""
        return self._digests.sha256

    def abandon(self) -> None:
        """Remove both files, as far as they are not whole."""
        self._image.abandon()
        self._digests.abandon()
