"""Standard output: written to the end at once, and what it means that it cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


class OutputLost(Exception):
    """Standard output cannot be written.

    reason -- the system's; None: whoever read it has gone, and there is nobody to tell
    """

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


def write(pieces: Iterable[str]) -> None:
    """Write `pieces` to standard output and flush it.  Raises OutputLost."""
    try:
        sys.stdout.writelines(pieces)
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes what is left as it exits, and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = isinstance(error, BrokenPipeError)
        raise OutputLost(None if gone else error.strerror or str(error)) from error
