"""How far the copying of disks is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .text import visible
from .units import size

log = logging.getLogger("ckptmgr")

LINES_EVERY = 30.0
"""Seconds between two lines of the log."""


class _Rate(ProgressColumn):
    """Bytes per second, in the units of all that we print (rich's own are decimal)."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{size(int(speed))}/s", style="progress.data.speed")


class CopyProgress:
    """A context manager, to be called with ``(disk, done, total)`` in bytes.

    On a terminal there is a bar for each disk on standard error, unless `quiet`; elsewhere the log
    is told, as information.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._bars: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                _Rate(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> CopyProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, disk: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `disk` are copied."""
        if self._bars is not None:
            if disk not in self._tasks:
                self._tasks[disk] = self._bars.add_task(visible(disk), total=total)
            self._bars.update(self._tasks[disk], completed=done, total=total)
            return
        now = time.monotonic()
        if disk not in self._told:
            log.info("disk %s: %s to read", disk, size(total))
            self._told[disk] = now
        elif now - self._told[disk] >= LINES_EVERY:
            log.info("disk %s: %s of %s", disk, size(done), size(total))
            self._told[disk] = now
