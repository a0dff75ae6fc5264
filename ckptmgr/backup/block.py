"""The unit that images, digests and comparisons of a repository have: a block of the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blake3 import blake3

BLOCK = 64 * 1024
"""Bytes of a block; the last one of a disk may be shorter."""

DIGEST_LENGTH = 32

ZERO = b""
"""Stands for the digest of a block that is all zeroes."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of a block that is not all zeroes: BLAKE3, 32 bytes.

    It is cryptographic, so that blocks with one digest are taken for the same, and some three
    times as fast as SHA-256 with the processor's help.
    """
    return blake3(data).digest()


def block_count(size: int) -> int:
    """Blocks of a disk of `size` bytes."""
    return -(-size // BLOCK)


def block_length(size: int, block: int) -> int:
    """Bytes that `block` of a disk of `size` bytes has: BLOCK, fewer for the last, 0 beyond."""
    return max(0, min(BLOCK, size - block * BLOCK))


def blocks_of(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs of blocks ``(first, count)`` that `extents`, ``(start, length)`` in bytes, touch.

    Both ascending; runs neither overlap nor touch.
    """
    first = past = 0
    for start, length in extents:
        if not length:
            continue
        begins, ends = start // BLOCK, block_count(start + length)
        if begins > past:
            if past > first:
                yield first, past - first
            first = begins
        past = max(past, ends)
    if past > first:
        yield first, past - first
