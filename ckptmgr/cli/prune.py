"""The command prune, and its calendar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .answer import Answer
from .arguments import Decorated, dry_run_option, kept_domain_argument, repository_argument
from .session import Command
from .table import Cell, Column, table
from .terminal import Style, Terminal
from .text import visible
from .units import local_time, size

if TYPE_CHECKING:
    from ..backup.views import PrunedPoint, PruneView

_RULES = {
    "last": "The last N points.",
    "hourly": "The last point of each of N hours.",
    "daily": "The last point of each of N days.",
    "weekly": "The last point of each of N weeks.",
    "monthly": "The last point of each of N months.",
    "yearly": "The last point of each of N years.",
}


def _keep_options(function: Decorated) -> Decorated:
    for rule, text in reversed(_RULES.items()):
        option: Callable[[Any], Any] = click.option(
            f"--keep-{rule}", rule, metavar="N", type=click.IntRange(min=1), help=text
        )
        function = option(function)
    return function


@click.command(cls=Command)
@repository_argument
@kept_domain_argument(required=False)
@_keep_options
@dry_run_option
def prune(repository: Path, domain: str | None, dry_run: bool, **rules: int | None) -> Answer:
    """Let restore points go that no rule keeps.

    Points that stay take over what they need of those that go. The newest point of a domain always
    stays, and so do points that a restored overlay stands on, and broken ones.
    """
    from ..backup.catalogue import repository as open_repository
    from ..backup.retention import Retention

    retention = Retention(**rules)
    found = open_repository(repository)
    view = found.plan_prune(retention, domain) if dry_run else found.prune(retention, domain)
    draw = calendar if dry_run else pruned
    return Answer(view.json, lambda terminal: draw(view, terminal))


def calendar(view: PruneView, terminal: Terminal) -> Iterator[str]:
    """What stays and why, a day after the other."""
    titles = ("Day", "Time", "Domain", "Point", "", "Why")
    rows: list[list[str | Cell]] = []
    last = ""
    for point in sorted(view.points, key=lambda each: each.created):
        day, time = local_time(point.created).split(" ", 1)
        day = _weekday(point.created, day)
        style = Style.GOOD if point.stays else Style.FAINT
        rows.append(
            [
                day if day != last else "",
                time,
                point.domain,
                Cell(point.name, style),
                Cell("stays" if point.stays else "goes", style),
                _why(point),
            ]
        )
        last = day
    yield from table([Column(title) for title in titles], rows, terminal)
    yield from _sum(view, terminal, "would go")
    yield terminal.paint("Nothing was done.", Style.FAINT)


def pruned(view: PruneView, terminal: Terminal) -> Iterator[str]:
    """The points that went, a name a line."""
    return (visible(point.name) for point in view.points if not point.stays)


def _weekday(created: int, day: str) -> str:
    from ..backup.retention import local

    return f"{local(created):%a} {day}"


def _why(point: PrunedPoint) -> str:
    why = ", ".join(point.reasons)
    if point.merges:
        why += f"; {' '.join(point.merges)} merged with what goes"
    return why


def _sum(view: PruneView, terminal: Terminal, what: str) -> Iterator[str]:
    going = [point for point in view.points if not point.stays]
    held = size(sum(point.bytes for point in going))
    yield f"{len(going)} of {len(view.points)} points {what}; their images have {held}."
    for damage in view.damaged:
        yield f"{terminal.paint('damaged:', Style.BAD)} {visible(damage.message)}"


COMMANDS = (prune,)
