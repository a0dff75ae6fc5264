"""The history as a tree.

A checkpoint stands below its parent.  An only child stays in its parent's column, so that a long
line of history stays a line; where the history forks, each branch gets a column of its own:

    o c0
    o c1
    |-o c2    snapshot before-update
    | o c3
    `-* c4    current   now: running
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..checkpoint import State
from .terminal import Style, Terminal
from .text import visible, width
from .units import local_time

if TYPE_CHECKING:
    from ..views import CheckpointView, ListView, PlaceView

_UNICODE = ("○ ", "● ", "├─", "└─", "│ ")
_ASCII = ("o ", "* ", "|-", "`-", "| ")

_Line = tuple[str, str, "CheckpointView"]
"""what leads to the node, the node, the checkpoint"""


def tree(view: ListView, terminal: Terminal) -> Iterator[str]:
    """Lines of the tree of a view's checkpoints: name, time, and what is special about each;
    after them the snapshots, and the domain, that come after no checkpoint.

    Siblings and roots come in the order in which they are given.  A checkpoint whose parent is
    not among them is drawn as a root.
    """
    checkpoints, snapshots, place = view.checkpoints, view.snapshots or (), view.place
    node, current, branch, last, bar = _UNICODE if terminal.unicode else _ASCII
    shown = {checkpoint.name for checkpoint in checkpoints}
    children: dict[str | None, list[CheckpointView]] = {}
    for checkpoint in checkpoints:
        parent = checkpoint.parent if checkpoint.parent in shown else None
        children.setdefault(parent, []).append(checkpoint)

    drawn: list[_Line | None] = []
    for root in children.get(None, []):
        if drawn:
            drawn.append(None)  # an empty line: what follows is not a child of what is above
        # (what leads to this line, what leads to the lines below it, the checkpoint)
        waiting = [("", "", root)]
        while waiting:
            lead, below, checkpoint = waiting.pop()
            mark = current if checkpoint.current else node
            drawn.append((lead, mark, checkpoint))
            offspring = children.get(checkpoint.name, [])
            if len(offspring) == 1:
                waiting.append((below, below, offspring[0]))
                continue
            for child in reversed(offspring):
                final = child is offspring[-1]
                waiting.append(
                    (below + (last if final else branch), below + ("  " if final else bar), child)
                )

    names = max((width(_name(line)) for line in drawn if line is not None), default=0)
    hanging: dict[str | None, list[str]] = {}
    for snapshot in snapshots:
        hanging.setdefault(snapshot.checkpoint, []).append(snapshot.name)
    for line in drawn:
        if line is None:
            yield ""
            continue
        name = line[2].name
        now = place.state if place is not None and place.checkpoint == name else None
        yield _draw(line, names, hanging.get(name, []), now, terminal)
    lines = _of_no_checkpoint(hanging.get(None, []), place)
    if drawn and lines:
        yield ""
    yield from lines


def _of_no_checkpoint(snapshots: list[str], place: PlaceView | None) -> list[str]:
    lines = [f"{_snapshots(snapshots)}: after no checkpoint"] if snapshots else []
    if place is not None and place.checkpoint is None:
        lines.append(f"now: {place.state}, after no checkpoint")
    return lines


def _snapshots(names: list[str]) -> str:
    return f"snapshot{'s' if len(names) > 1 else ''} {visible(', '.join(names))}"


def _name(line: _Line) -> str:
    lead, _, checkpoint = line
    return lead + visible(checkpoint.name)


def _draw(
    line: _Line, names: int, snapshots: list[str], now: str | None, terminal: Terminal
) -> str:
    lead, mark, checkpoint = line
    padding = " " * (names - width(_name(line)))
    broken = [disk.name for disk in checkpoint.disks if disk.state is State.BROKEN]
    notes = ""
    if checkpoint.current:
        notes += "   " + terminal.paint("current", Style.GOOD)
    if now is not None:
        notes += "   " + terminal.paint(f"now: {now}", Style.STRONG)
    if snapshots:
        notes += "   " + terminal.paint(_snapshots(snapshots), Style.WARNING)
    if broken:
        notes += "   " + terminal.paint(f"broken: {visible(', '.join(broken))}", Style.BAD)
    style = Style.GOOD if checkpoint.current else Style.PLAIN
    return (
        terminal.paint(lead, Style.FAINT)
        + terminal.paint(mark, style if style else Style.FAINT)
        + terminal.paint(visible(checkpoint.name), style)
        + padding
        + "   "
        + terminal.paint(local_time(checkpoint.created), Style.FAINT)
        + notes
    )
