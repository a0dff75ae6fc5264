"""Having the kernel write a file to its disk while it is still being filled.

Without that it keeps up to a tenth of the memory, and the disk has nothing to do until the fsync at
the end, which then waits for all of it.
"""

from __future__ import annotations

import os
from contextlib import suppress

_AT_ONCE = 32 << 20


class WriteBack:
    """Of a file that is filled from front to back."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._begun = 0

    def reached(self, end: int) -> None:
        """All before offset `end` is written, as far as the file is concerned."""
        if end - self._begun >= _AT_ONCE:
            # Starts writing and waits for nothing; errors are left to fsync.
            with suppress(OSError):
                os.posix_fadvise(self._file, self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end
