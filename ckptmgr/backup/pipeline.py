"""The threads that a copy goes through.

    main thread       reads, or asks a server that has several requests to work on at any time
    workers           what can be done to each batch by itself: digests, compression
    one more thread   what has to be done in the order of the disk: writing

What fails in another thread is raised in the main one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from .batch import Batch, Buffer, Chunk, Zeroes, spare

T = TypeVar("T")

_POLL = 0.2
"""Seconds after which a waiting thread looks whether it is to go on, for ^C."""


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


class Pipeline(Generic[T]):
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

    def __enter__(self) -> Pipeline[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._failed is None:
            self._failed = _Stopped()
        self._queue.put(None)
        self._thread.join()
        self._workers.shutdown()
        while not self._free.empty():
            spare.append(self._free.get_nowait())
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
            return spare.pop()
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
            if isinstance(item, Zeroes):
                self._reader.zero(item.first, item.count)
                self._progress(item.length)
            else:
                self._reader.take(item, next(done))
                self._progress(len(item.data))


class _Stopped(Exception):
    """The reading ended early."""
