"""A folder that only we can enter, for a socket; what killed processes left of them is removed.

The folder is locked (flock) as long as its process lives: a lock says so in other pid namespaces
too, and goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "ckptmgr-nbd-"

# Between the making of a folder and its lock.
_YOUNG = 60.0


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder of mode 0700, gone afterwards."""
    sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, _opened(Path(name)) as descriptor:
        _lock(descriptor)
        yield Path(name)


def sweep(parent: Path) -> None:
    """Remove the folders in `parent` whose process was killed."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            status = os.fstat(descriptor)
            old = time.time() - status.st_mtime > _YOUNG
            if old and status.st_uid == os.geteuid() and _lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
