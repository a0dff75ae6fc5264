"""Reading the blocks of a disk from an NBD export, as fast as the server gives them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO
from typing import TYPE_CHECKING, TypeVar

import nbd

from .. import nbd as nbd_client
from ..errors import OperationFailed
from .batch import Batch, Buffer, Chunk, Zeroes
from .block import BLOCK, block_count
from .defect import Extent, first_defect, unreadable
from .pipeline import Pipeline, Reader
from .rate import UNLIMITED, Rate

if TYPE_CHECKING:
    from ..plan.steps import Server

T = TypeVar("T")

BUFFERS = 6
"""Requests that are on their way from a server to the disk at any time, for each thread that
prepares: few, so that what was read is still in the processor's cache when it is written."""

UNDER_WAY = 3
"""Requests of these that the server has."""

_READS_ZERO = 2  # NBD_STATE_ZERO
_STATUS_SPAN = 16384
"""Blocks that the server is asked about at once, to know which are zero: 1 GiB."""

Runs = Iterable[tuple[int, int]]
"""Runs of blocks, ``(first, count)``, ascending."""

_Flying = deque[Batch]
"""What is asked of the server, in order."""


class Source:
    """A connection to the NBD export of a disk.

    Raises OperationFailed where the server cannot be reached.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        disk: str,
        *,
        check: Callable[[], None] = nbd_client.unwatched,
    ) -> None:
        self.disk = disk
        self._server = server
        self._name = name
        self._check = check
        with self._failing():
            context = nbd_client.ALLOCATION
            self._handle = nbd_client.connect(server, name, disk, context, check=check)
            # What a request was not answered in full for is never looked at.
            self._handle.set_pread_initialize(False)
            self._told = self._handle.can_meta_context(context)
            self.size: int = self._handle.get_size()

    def close(self) -> None:
        """Say good-bye to the server."""
        nbd_client.disconnect(self._handle)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _failing(self, asked: Callable[[], Iterable[Extent]] = tuple) -> Iterator[None]:
        """asked -- what of the disk was asked for and had not come"""
        try:
            yield
        except nbd.Error as error:
            self._check()
            found = first_defect(self._server, self._name, self.disk, asked())
            if found is not None:
                raise unreadable(self.disk, found) from error
            raise OperationFailed(
                f"reading disk {self.disk} over NBD failed: {error.string}",
                hint="did the domain end or move to another host, or this one run out of memory or "
                "disk?",
            ) from error

    # --- what is to be read ------------------------------------------------------------------

    def _pieces(self, runs: Runs, most: int) -> Iterator[tuple[bool, int, int]]:
        """``(zero, first, count)``: what the server says is zero, and requests for the rest, of
        `most` blocks.
        """
        total = block_count(self.size)
        for part in _spans(runs):
            first, past = part[0][0], min(sum(part[-1]), total)
            if first >= past:
                return
            zeroes = self._zeroes(first, past)
            low, high = next(zeroes, (past, past))
            for begin, count in part:
                end = min(begin + count, total)
                while begin < end:
                    while high <= begin:
                        low, high = next(zeroes, (past, past + 1))
                    if low <= begin:
                        stop = min(end, high)
                        yield True, begin, stop - begin
                    else:
                        stop = min(end, low, begin + most)
                        yield False, begin, stop - begin
                    begin = stop

    def _zeroes(self, first: int, past: int) -> Iterator[tuple[int, int]]:
        """Runs ``[low, high)`` of whole blocks that read as zeroes."""
        if not self._told:
            return
        end = min(past * BLOCK, self.size)
        context = nbd_client.ALLOCATION
        known = first * BLOCK

        def zero() -> Iterator[tuple[int, int, bool]]:
            nonlocal known
            for start, length, flags in nbd_client.status(
                self._handle, context, self.disk, known, end
            ):
                known = start + length
                yield start, length, bool(flags & _READS_ZERO)

        try:
            for start, length in nbd_client.join(zero()):
                low = -(-start // BLOCK)
                reach = start + length
                high = block_count(reach) if reach == self.size else reach // BLOCK
                if low < high:
                    yield low, high
        except nbd.Error as error:
            if error.errnum != EIO:
                raise
            # What the image says of itself there is not to be had.
            raise unreadable(self.disk, (known, end - known)) from error

    # --- reading -----------------------------------------------------------------------------

    def read(
        self,
        runs: Runs,
        reader: Reader[T],
        *,
        rate: Rate = UNLIMITED,
        progress: Callable[[int], None] = lambda length: None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """Read the blocks in `runs`; those beyond the end of the disk are not there.

        progress -- called with the bytes that were done since the last call
        watch -- called several times a second, also while there is nothing to do; may raise

        Raises OperationFailed for what the server does, and whatever `reader` raises.
        """
        # Where this fails, the server's answers may still come into the buffers of what is flying.
        flying: _Flying = deque()
        batch = Batch()

        def asked() -> Iterator[Extent]:
            for each in (*flying, batch):
                for item in each.items:
                    if isinstance(item, Chunk):
                        yield item.first * BLOCK, len(item.data)

        room = BUFFERS * reader.workers
        with self._failing(asked), Pipeline(reader, progress, watch, buffers=room) as pipeline:
            for zero, first, count in self._pieces(runs, rate.request):
                length = min(count * BLOCK, self.size - first * BLOCK)
                seconds = 0.0 if zero else rate.wait(length)
                if seconds > 0 or not batch.fits(0 if zero else length):
                    self._send(batch, flying, pipeline)
                    batch = Batch()
                if seconds > 0:
                    self._land_all(flying, pipeline)
                    pipeline.pause(seconds)
                if zero:
                    batch.items.append(Zeroes(first, count, self.size))
                    continue
                if batch.buffer is None:
                    batch.buffer = self._buffer(flying, pipeline)
                chunk = Chunk(first, *batch.room(length))
                batch.items.append(chunk)
                batch.cookies.append(self._handle.aio_pread(chunk.room, first * BLOCK))
            self._send(batch, flying, pipeline)
            self._land_all(flying, pipeline)

    def _send(self, batch: Batch, flying: _Flying, pipeline: Pipeline[T]) -> None:
        """Nothing more is asked for with this one."""
        flying.append(batch)
        while len(flying) >= UNDER_WAY:
            self._land(flying, pipeline)

    def _land(self, flying: _Flying, pipeline: Pipeline[T]) -> None:
        """Wait for the oldest batch, and hand it on."""
        pipeline.check()
        oldest = flying[0]
        for cookie in oldest.cookies:
            deadline = time.monotonic() + nbd_client.ANSWER_TIMEOUT
            while not self._handle.aio_command_completed(cookie):
                pipeline.check()
                nbd_client.poll(self._handle, deadline, self.disk)
        flying.popleft()
        pipeline.put(oldest)

    def _land_all(self, flying: _Flying, pipeline: Pipeline[T]) -> None:
        while flying:
            self._land(flying, pipeline)

    def _buffer(self, flying: _Flying, pipeline: Pipeline[T]) -> Buffer:
        while (found := pipeline.buffer()) is None:
            if flying:
                self._land(flying, pipeline)
            else:
                pipeline.wait()
        return found


def _spans(runs: Runs) -> Iterator[list[tuple[int, int]]]:
    """`runs`, as many at a time as the server is asked about at once."""
    part: list[tuple[int, int]] = []
    for first, count in runs:
        while count:
            begin = part[0][0] if part else first
            room = begin + _STATUS_SPAN - first
            if room <= 0:
                yield part
                part = []
                continue
            taken = min(count, room)
            part.append((first, taken))
            first, count = first + taken, count - taken
    if part:
        yield part


@dataclass(frozen=True)
class _Consumer:
    """A reader that wants each chunk with its digests."""

    consume: Callable[[int, memoryview, Sequence[bytes]], None]
    zeroes: Callable[[int, int], None]
    workers = 1

    def prepare(self, chunk: Chunk) -> list[bytes]:
        return chunk.digests()

    def take(self, chunk: Chunk, prepared: list[bytes]) -> None:
        self.consume(chunk.first, chunk.data, prepared)

    def zero(self, first: int, count: int) -> None:
        self.zeroes(first, count)


def read_blocks(
    source: Source,
    runs: Runs,
    consume: Callable[[int, memoryview, Sequence[bytes]], None],
    zero: Callable[[int, int], None],
    *,
    progress: Callable[[int], None] = lambda length: None,
) -> None:
    """Read blocks with their digests.

    consume -- ``(first, data, digests)``: consecutive blocks, a digest each, ZERO for zeroes;
               `data` is good until it returns
    zero -- ``(first, count)``: blocks of which the server says that they are zero

    Both are called in the order of the blocks.  Raises as `Source.read`.
    """
    source.read(runs, _Consumer(consume, zero), progress=progress)
