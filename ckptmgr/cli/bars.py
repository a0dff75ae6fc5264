"""A bar on the terminal for each disk that is copied."""

from __future__ import annotations

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
from rich.table import Column
from rich.text import Text

from .text import visible
from .units import size


class _Rate(ProgressColumn):
    """Bytes per second, in the units of all that we print (rich's own are decimal)."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{size(int(speed))}/s", style="progress.data.speed")


class Bars:
    """On standard error, from `start` to `stop`; then they are gone."""

    def __init__(self, console: Console | None = None) -> None:
        # What does not fit is taken from the bar: a line of two would be left on the terminal.
        whole = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True, table_column=whole),
            _Rate(table_column=whole.copy()),
            TimeRemainingColumn(table_column=whole.copy()),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self.start, self.stop = self._progress.start, self._progress.stop

    def show(self, disk: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `disk` are copied."""
        if disk not in self._tasks:
            self._tasks[disk] = self._progress.add_task(visible(disk), total=total)
        self._progress.update(self._tasks[disk], completed=done, total=total)
