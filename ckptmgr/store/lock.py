"""One writer per domain: an flock, which the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Busy
from . import files

_POLL = 0.05  # seconds; flock has no timeout of its own


@contextmanager
def held(path: Path, timeout: float, what: str) -> Iterator[None]:
    """Hold the lock `path`, waiting for it up to `timeout` seconds; 0 means to try once.

    `what` names the thing that is locked.  Not re-entrant.  Raises Busy, and StoreFailed.
    """
    lock = files.open_lock(path)
    try:
        _acquire(lock, path, timeout, what)
        files.write_holder(lock, f"{os.getpid()}\n")
        try:
            yield
        finally:
            files.write_holder(lock, "")
    finally:
        os.close(lock)


def _acquire(lock: int, path: Path, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while True:
        with files.failing(path, "cannot be locked"):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return
        left = deadline - time.monotonic()
        if left <= 0:
            raise Busy(
                f"{what} is being changed by {_holder(lock)}",
                hint="try again when it is done",
            )
        time.sleep(min(_POLL, left))


def _holder(lock: int) -> str:
    # The holder writes its number just after it has the lock, so there may be none yet.
    found = re.match(rb"[0-9]+", os.pread(lock, 32, 0))
    return f"process {int(found.group())}" if found else "another process"
