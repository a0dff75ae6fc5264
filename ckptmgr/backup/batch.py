"""What goes from thread to thread while a disk is copied: blocks as they were read, and zeroes.

libnbd 1.14 keeps a reference to each buffer for every request that used it, so the buffers are
few, and used again and again by all connections of the process; that bounds the memory, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import nbd

from .block import BLOCK, ZERO, block_count, digest
from .rate import REQUEST

_ITEMS = 64
"""Chunks and runs of zeroes in a batch at most."""


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


spare: deque[Buffer] = deque()
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
class Zeroes:
    """Consecutive blocks that are known to be zero.

    first, count -- of the blocks
    size -- of the disk in bytes
    """

    first: int
    count: int
    size: int

    @property
    def length(self) -> int:
        """Their bytes."""
        return min((self.first + self.count) * BLOCK, self.size) - self.first * BLOCK


class Batch:
    """What goes from thread to thread at once: chunks in one buffer, and zeroes between them.

    items -- in the order of the disk
    cookies -- of the requests for the chunks
    buffer -- None while there is no chunk
    """

    def __init__(self) -> None:
        self.items: list[Chunk | Zeroes] = []
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
