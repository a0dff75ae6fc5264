"""What a local image says of itself.

Nothing here takes a lock or writes, so a running QEMU does not mind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import qcow2
from ..errors import OperationFailed


@contextmanager
def opened(path: str | Path) -> Iterator[int | None]:
    """A descriptor of the file or block device there; None for anything else.  Raises OSError."""
    # O_NONBLOCK: a path may turn out to be a fifo.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        yield descriptor if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None
    finally:
        os.close(descriptor)


def read_header(path: str | Path) -> qcow2.Header | None:
    """The header of a local image; None if it is no qcow2 (or no regular file or device).

    Raises OSError if it cannot be read.
    """
    with opened(path) as descriptor:
        try:
            return None if descriptor is None else qcow2.read_header(descriptor)
        except qcow2.Malformed:
            return None


def internal_snapshots(path: str | Path) -> frozenset[str]:
    """Names of the internal snapshots of a local qcow2 image; none of what is no qcow2.

    Reads the table itself; nothing is locked.  Raises OSError, and OperationFailed for a table
    that makes no sense.
    """
    with opened(path) as descriptor:
        if descriptor is None:
            return frozenset()
        try:
            header = qcow2.read_header(descriptor)
            return frozenset() if header is None else qcow2.read_snapshots(descriptor, header)
        except qcow2.Malformed as error:
            raise OperationFailed(f"the image {path} is damaged: {error}") from error


def raw_size(path: str | Path) -> int | None:
    """The virtual size of a raw image: a regular file's, in whole sectors as QEMU counts; None
    for what is no regular file.  Raises OSError.
    """
    found = Path(path).stat()
    return -(-found.st_size // 512) * 512 if stat.S_ISREG(found.st_mode) else None
