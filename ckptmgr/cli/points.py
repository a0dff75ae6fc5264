"""The command points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answer import Answer
from .arguments import kept_domain_argument, repository_argument
from .session import Command
from .table import Cell, Column, table
from .terminal import Style, Terminal
from .text import visible, width
from .tree import glyphs, layout
from .units import local_time, size

if TYPE_CHECKING:
    from ..backup.views import PointsView, PointView


@click.command(cls=Command)
@repository_argument
@kept_domain_argument(required=False)
@click.option("--tree", "as_tree", is_flag=True, help="Draw the tree.")
def points(repository: Path, domain: str | None, as_tree: bool) -> Answer:
    """List the restore points in a repository.

    Needs no hypervisor and changes nothing. REPO is the folder that `backup` writes to.
    """
    from ..backup.catalogue import repository as open_repository

    found = open_repository(repository).points(domain)
    draw = point_tree if as_tree else point_list
    return Answer(found.json, lambda terminal: draw(found, terminal))


def point_list(view: PointsView, terminal: Terminal) -> Iterator[str]:
    """The table of ``points``, and what cannot be used."""
    columns = [Column(title) for title in ("Domain", "Name", "Created", "Parent", "Checkpoint")]
    columns += [Column("Disks"), Column("Size", right=True)]
    if any(point.broken for point in view.points):
        columns.append(Column("Broken"))
    rows = []
    for point in view.points:
        row: list[str | Cell] = [
            point.domain,
            Cell(point.name, Style.BAD if point.broken else Style.PLAIN),
            local_time(point.created),
            point.parent or "-",
            point.checkpoint or "-",
            _disks(point),
            size(point.bytes),
        ]
        if len(columns) > len(row):
            row.append(Cell(point.broken or "", Style.BAD))
        rows.append(row)
    yield from table(columns, rows, terminal)
    yield from _damaged(view, terminal)


def point_tree(view: PointsView, terminal: Terminal) -> Iterator[str]:
    """The tree of ``points --tree``: name, time, size, and what is special about each."""
    own = glyphs(terminal)
    several = len({point.uuid for point in view.points}) > 1
    drawn: list[tuple[str, PointView] | None] = []
    for lineage in dict.fromkeys(point.lineage for point in view.points):
        if drawn:
            drawn.append(None)
        nodes = [point for point in view.points if point.lineage == lineage]
        drawn += layout(nodes, lambda point: point.name, lambda point: point.parent, own)
    shown = [line for line in drawn if line is not None]
    names = max((width(lead + visible(point.name)) for lead, point in shown), default=0)
    sizes = max((len(size(point.bytes)) for _, point in shown), default=0)
    for line in drawn:
        if line is None:
            yield ""
            continue
        lead, point = line
        style = Style.BAD if point.broken else Style.PLAIN
        padding = " " * (names - width(lead + visible(point.name)))
        text = terminal.paint(lead, Style.FAINT) + terminal.paint(own.node, style or Style.FAINT)
        text += terminal.paint(visible(point.name), style) + padding
        text += "   " + terminal.paint(local_time(point.created), Style.FAINT)
        text += f"   {size(point.bytes):>{sizes}}   {visible(_disks(point))}"
        if several:
            text += f"   {visible(point.domain)}"
        if point.broken:
            text += "   " + terminal.paint(f"broken: {visible(point.broken)}", Style.BAD)
        yield text
    yield from _damaged(view, terminal)


def _disks(point: PointView) -> str:
    """``vda vdb (full)``: the disks, each that is no increment marked."""
    if not point.disks:
        return "-"
    if len(point.disks) > 1 and all(disk.base is None for disk in point.disks):
        return f"{' '.join(disk.name for disk in point.disks)} (all full)"
    return " ".join(
        f"{disk.name} (full)" if disk.base is None else disk.name for disk in point.disks
    )


def _damaged(view: PointsView, terminal: Terminal) -> Iterator[str]:
    for damage in view.damaged:
        yield f"{terminal.paint('damaged:', Style.BAD)} {visible(damage.message)}"


COMMANDS = (points,)
