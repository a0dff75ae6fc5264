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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..checkpoint import State
from .terminal import Style, Terminal
from .text import visible, width
from .units import local_time

if TYPE_CHECKING:
    from ..views import CheckpointView, ListView, PlaceView


@dataclass(frozen=True)
class Glyphs:
    """The characters of which a tree is drawn."""

    node: str
    current: str
    branch: str
    last: str
    bar: str


_UNICODE = Glyphs("○ ", "● ", "├─", "└─", "│ ")
_ASCII = Glyphs("o ", "* ", "|-", "`-", "| ")


def glyphs(terminal: Terminal) -> Glyphs:
    """The characters that `terminal` can show."""
    return _UNICODE if terminal.unicode else _ASCII


T = TypeVar("T")

_Line = tuple[str, str, "CheckpointView"]
"""what leads to the node, the node, the checkpoint"""


def layout(
    nodes: Sequence[T], name: Callable[[T], str], parent: Callable[[T], str | None], glyphs: Glyphs
) -> Iterator[tuple[str, T] | None]:
    """What leads to each node, and the node, a line each; None for an empty line: what follows is
    not a child of what is above.

    Siblings and roots come in the order in which they are given.  A node whose parent is not among
    them is drawn as a root.
    """
    shown = {name(node) for node in nodes}
    children: dict[str | None, list[T]] = {}
    for node in nodes:
        above = parent(node)
        children.setdefault(above if above in shown else None, []).append(node)
    for number, root in enumerate(children.get(None, [])):
        if number:
            yield None
        # (what leads to this line, what leads to the lines below it, the node)
        waiting = [("", "", root)]
        while waiting:
            lead, below, node = waiting.pop()
            yield lead, node
            offspring = children.get(name(node), [])
            if len(offspring) == 1:
                waiting.append((below, below, offspring[0]))
                continue
            for child in reversed(offspring):
                final = child is offspring[-1]
                branch = glyphs.last if final else glyphs.branch
                waiting.append((below + branch, below + ("  " if final else glyphs.bar), child))


def tree(view: ListView, terminal: Terminal) -> Iterator[str]:
    """Lines of the tree of a view's checkpoints: name, time, and what is special about each;
    after them the snapshots, and the domain, that come after no checkpoint.

    Siblings and roots come in the order in which they are given.  A checkpoint whose parent is
    not among them is drawn as a root.
    """
    checkpoints, snapshots, place = view.checkpoints, view.snapshots or (), view.place
    drawn: list[_Line | None] = []
    own = glyphs(terminal)
    for found in layout(checkpoints, lambda each: each.name, lambda each: each.parent, own):
        if found is None:
            drawn.append(None)
            continue
        lead, checkpoint = found
        drawn.append((lead, own.current if checkpoint.current else own.node, checkpoint))

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
