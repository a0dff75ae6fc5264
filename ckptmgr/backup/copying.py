"""Reading the blocks of a disk from an NBD export, as fast as the server gives them.

    main thread       asks the server, which has several requests to work on at any time
    workers           what can be done to each request by itself: digests, compression
    one more thread   what has to be done in the order of the disk: writing

libnbd 1.14 keeps a reference to each buffer for every request that used it, so the buffers are
few, and used again and again by all connections of the process; that bounds the memory, too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import EIO
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import nbd

from .. import nbd as nbd_client
from ..errors import OperationFailed
from .block import BLOCK, ZERO, block_count, digest
from .defect import Extent, first_defect, unreadable
from .rate import REQUEST, UNLIMITED, Rate

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

_ITEMS = 64
"""Chunks and runs of zeroes in a batch at most."""

_POLL = 0.2
"""Seconds after which a waiting thread looks whether it is to go on, for ^C."""

Runs = Iterable[tuple[int, int]]
"""Runs of blocks, ``(first, count)``, ascending."""


class Buffer:
    """Room for one request, or for several small ones."""

    def __init__(self) -> None:
        self.room = bytearray(REQUEST * BLOCK)
        self._parts: dict[tuple[int, int], nbd.Buffer] = {}

    def part(self, start: int, length: int) -> nbd.Buffer:
        """libnbd's object for `length` bytes from `start` on, always the same one."""
        found = self._parts.get((start, length))
        if found is None:
            view = memoryview(self.room)[start : start + length]
            found = self._parts[start, length] = nbd.Buffer.from_buffer(view)
        return found


_spare: deque[Buffer] = deque()
"""Buffers that nobody uses now."""


@dataclass
class Chunk:
    """Consecutive blocks as they were read.

    first -- number of the first
    data -- their bytes; to be used before `take` returns
    room -- libnbd's object for these
    """

    first: int
    data: memoryview
    room: nbd.Buffer = field(repr=False)

    def blocks(self) -> Iterator[tuple[int, memoryview]]:
        """Each block's number and bytes."""
        for number, start in enumerate(range(0, len(self.data), BLOCK), self.first):
            yield number, self.data[start : start + BLOCK]

    def digests(self) -> list[bytes]:
        """Each block's digest, ZERO for one that is all zeroes."""
        found = []
        for start in range(0, len(self.data), BLOCK):
            length = min(BLOCK, len(self.data) - start)
            if self.room.is_zero(start, length):
                found.append(ZERO)
            else:
                found.append(digest(self.data[start : start + length]))
        return found


@dataclass(frozen=True)
class _Zero:
    first: int
    count: int
    size: int

    @property
    def length(self) -> int:
        return min((self.first + self.count) * BLOCK, self.size) - self.first * BLOCK


class Batch:
    """What goes from thread to thread at once: chunks in one buffer, and zeroes between them.

    items -- in the order of the disk
    cookies -- of the requests for the chunks
    buffer -- None while there is no chunk
    """

    def __init__(self) -> None:
        self.items: list[Chunk | _Zero] = []
        self.cookies: list[int] = []
        self.buffer: Buffer | None = None
        self._used = 0

    def fits(self, length: int) -> bool:
        """Whether there is room for that many bytes more."""
        return self._used + length <= REQUEST * BLOCK and len(self.items) < _ITEMS

    def room(self, length: int) -> tuple[memoryview, nbd.Buffer]:
        """Room for `length` bytes in the buffer, as a chunk has it."""
        assert self.buffer is not None  # noqa: S101 -- whoever wants room in it has put one there
        start, self._used = self._used, self._used + block_count(length) * BLOCK
        return memoryview(self.buffer.room)[start : start + length], self.buffer.part(start, length)


_Flying = deque[Batch]
"""What is asked of the server, in order."""


class Reader(Protocol, Generic[T]):
    """What becomes of the blocks."""

    @property
    def workers(self) -> int:
        """How many threads prepare.

        One makes digests faster than a server sends; a second is in the way of it, unless there is
        more to be done.
        """
        ...

    def prepare(self, chunk: Chunk) -> T:
        """What needs no order; called by several threads."""
        ...

    def take(self, chunk: Chunk, prepared: T) -> None:
        """The rest, in the order of the blocks."""
        ...

    def zero(self, first: int, count: int) -> None:
        """Blocks of which the server says that they read as zeroes; in the same order."""
        ...


class Source:
    """A connection to the NBD export of a disk.

    Raises OperationFailed where the server cannot be reached.
    """

    def __init__(
        self, server: Server, name: str, disk: str, *, check: Callable[[], None] = lambda: None
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
        with self._failing(asked), Order(reader, progress, watch, buffers=room) as order:
            for zero, first, count in self._pieces(runs, rate.request):
                length = min(count * BLOCK, self.size - first * BLOCK)
                seconds = 0.0 if zero else rate.wait(length)
                if seconds > 0 or not batch.fits(0 if zero else length):
                    self._send(batch, flying, order)
                    batch = Batch()
                if seconds > 0:
                    self._land_all(flying, order)
                    order.pause(seconds)
                if zero:
                    batch.items.append(_Zero(first, count, self.size))
                    continue
                if batch.buffer is None:
                    batch.buffer = self._buffer(flying, order)
                chunk = Chunk(first, *batch.room(length))
                batch.items.append(chunk)
                batch.cookies.append(self._handle.aio_pread(chunk.room, first * BLOCK))
            self._send(batch, flying, order)
            self._land_all(flying, order)

    def _send(self, batch: Batch, flying: _Flying, order: Order[T]) -> None:
        """Nothing more is asked for with this one."""
        flying.append(batch)
        while len(flying) >= UNDER_WAY:
            self._land(flying, order)

    def _land(self, flying: _Flying, order: Order[T]) -> None:
        """Wait for the oldest batch, and hand it on."""
        order.check()
        oldest = flying[0]
        for cookie in oldest.cookies:
            deadline = time.monotonic() + nbd_client.ANSWER_TIMEOUT
            while not self._handle.aio_command_completed(cookie):
                order.check()
                nbd_client.poll(self._handle, deadline, self.disk)
        flying.popleft()
        order.put(oldest)

    def _land_all(self, flying: _Flying, order: Order[T]) -> None:
        while flying:
            self._land(flying, order)

    def _buffer(self, flying: _Flying, order: Order[T]) -> Buffer:
        while (found := order.buffer()) is None:
            if flying:
                self._land(flying, order)
            else:
                order.wait()
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


class Order(Generic[T]):
    """Hands batches to a reader: `prepare` side by side, the rest in the order they came in.

    buffers -- how many there may be at any time, those that are only asked for included
    """

    def __init__(
        self,
        reader: Reader[T],
        progress: Callable[[int], None],
        watch: Callable[[], None],
        *,
        buffers: int,
    ) -> None:
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._room = buffers
        self._reader = reader
        self._progress = progress
        self._watch = watch
        self._queue: queue.SimpleQueue[tuple[Batch, Future[list[T]]] | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._workers = ThreadPoolExecutor(reader.workers, "ckptmgr-digest")
        self._thread = threading.Thread(target=self._run, name="ckptmgr-write", daemon=True)

    def __enter__(self) -> Order[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._failed is None:
            self._failed = _Stopped()
        self._queue.put(None)
        self._thread.join()
        self._workers.shutdown()
        while not self._free.empty():
            _spare.append(self._free.get_nowait())
        if kind is None and self._failed is not None:
            raise self._failed

    def check(self) -> None:
        """Raise what the reader has raised, or `watch` raises."""
        if self._failed is not None:
            raise self._failed
        self._watch()

    def pause(self, seconds: float) -> None:
        """Wait; raises as `check`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _POLL))

    def buffer(self) -> Buffer | None:
        """A buffer that nobody uses now; None: `wait` until one is handed back."""
        with suppress(queue.Empty):
            return self._free.get_nowait()
        if not self._room:
            return None
        self._room -= 1
        with suppress(IndexError):
            return _spare.pop()
        return Buffer()

    def wait(self) -> None:
        """Wait for a moment in which a buffer may be handed back; raises as `check`."""
        with suppress(queue.Empty):
            self._free.put(self._free.get(timeout=_POLL))
        self.check()

    def put(self, batch: Batch) -> None:
        """Hand on what was read."""
        self._queue.put((batch, self._workers.submit(self._prepare, batch)))

    def _prepare(self, batch: Batch) -> list[T]:
        return [self._reader.prepare(item) for item in batch.items if isinstance(item, Chunk)]

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, prepared = item
            try:
                self._take(batch, prepared)
            except BaseException as error:  # noqa: BLE001 -- raised by the other thread's check()
                if self._failed is None:
                    self._failed = error
            finally:
                if batch.buffer is not None:
                    self._free.put(batch.buffer)

    def _take(self, batch: Batch, prepared: Future[list[T]]) -> None:
        done = iter(prepared.result())  # also after a failure: nothing may use the buffer then
        if self._failed is not None:
            return
        for item in batch.items:
            if isinstance(item, _Zero):
                self._reader.zero(item.first, item.count)
                self._progress(item.length)
            else:
                self._reader.take(item, next(done))
                self._progress(len(item.data))


class _Stopped(Exception):
    """The reading ended early."""


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
