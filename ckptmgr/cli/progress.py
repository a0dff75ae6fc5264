"""How far the copying of disks is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from .units import size

if TYPE_CHECKING:
    from .bars import Bars

log = logging.getLogger("ckptmgr")

LINES_EVERY = 30.0
"""Seconds between two lines of the log."""


class CopyProgress:
    """A context manager, to be called with ``(disk, done, total)`` in bytes.

    On a terminal there is a bar for each disk on standard error, unless `quiet`; elsewhere the log
    is told, as information.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._bars: Bars | None = None
        if sys.stderr.isatty() and not quiet:
            from .bars import Bars  # rich takes a tenth of a second to load

            self._bars = Bars()
        self._told: dict[str, float] = {}

    def __enter__(self) -> CopyProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, disk: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `disk` are copied."""
        if self._bars is not None:
            self._bars.show(disk, done, total)
            return
        now = time.monotonic()
        if disk not in self._told:
            log.info("disk %s: %s to read", disk, size(total))
            self._told[disk] = now
        elif now - self._told[disk] >= LINES_EVERY:
            log.info("disk %s: %s of %s", disk, size(done), size(total))
            self._told[disk] = now
