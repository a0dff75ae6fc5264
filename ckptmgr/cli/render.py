"""Checkpoints, differences and plans as text for people: pure functions over the views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint import State
from .table import Cell, Column, table
from .terminal import Style, Terminal
from .text import visible, visible_lines
from .units import local_time, percent, size

if TYPE_CHECKING:
    from ..consistency import Finding
    from ..plan.steps import Plan
    from ..views import CheckpointView, DiffView, DiskDiff, DiskView, ListView, SnapshotView

STATE_STYLES = {
    State.RECORDING: Style.GOOD,
    State.FROZEN: Style.WARNING,
    State.ARCHIVED: Style.FAINT,
    State.BROKEN: Style.BAD,
    State.NONE: Style.FAINT,
}

# Most telling first: what needs attention must not hide behind what is fine.
_ATTENTION = (State.BROKEN, State.FROZEN, State.ARCHIVED, State.RECORDING)

_DISKS_SHOWN = 6


def checkpoint_list(view: ListView, terminal: Terminal, *, parents: bool = False) -> Iterator[str]:
    """The table of ``list``; the current checkpoint is marked with ``*``."""
    columns = [Column(""), Column("Name"), Column("Created"), Column("Engine"), Column("Disks")]
    columns.append(Column("State"))
    if parents:
        columns.insert(2, Column("Parent"))
    rows = []
    for checkpoint in view.checkpoints:
        style = Style.GOOD if checkpoint.current else Style.PLAIN
        row: list[str | Cell] = [
            Cell("*" if checkpoint.current else "", style),
            Cell(checkpoint.name, style),
            local_time(checkpoint.created),
            checkpoint.engine.value,
            _tracked(checkpoint.disks),
            _state(checkpoint.disks),
        ]
        if parents:
            row.insert(2, checkpoint.parent or "")
        rows.append(row)
    return table(columns, rows, terminal, mark=True)


def _tracked(disks: Sequence[DiskView]) -> str:
    names = [disk.name for disk in disks if disk.bitmap is not None]
    if len(names) > _DISKS_SHOWN:
        names[_DISKS_SHOWN - 1 :] = [f"and {len(names) - _DISKS_SHOWN + 1} more"]
    return " ".join(names)


def _state(disks: Sequence[DiskView]) -> Cell:
    tracked = [disk for disk in disks if disk.bitmap is not None]
    states = [state for state in _ATTENTION if any(disk.state is state for disk in tracked)]
    if not states:
        return Cell("")
    if len(states) == 1:
        return Cell(states[0].value, STATE_STYLES[states[0]])
    parts = [
        f"{state.value} ({' '.join(disk.name for disk in tracked if disk.state is state)})"
        for state in states
    ]
    return Cell(", ".join(parts), STATE_STYLES[states[0]])


def snapshot_list(found: Sequence[SnapshotView], terminal: Terminal) -> Iterator[str]:
    """The table of ``snapshot list``; libvirt's current snapshot is marked with ``*``."""
    titles = ("", "Name", "Created", "Checkpoint", "State", "Memory", "Disks")
    rows = []
    for snapshot in found:
        style = Style.GOOD if snapshot.current else Style.PLAIN
        kinds = {kind for _, kind in snapshot.disks if kind != "no"}
        disks = " ".join(name for name, kind in snapshot.disks if kind != "no")
        row: list[str | Cell] = [
            Cell("*" if snapshot.current else "", style),
            Cell(snapshot.name, style),
            local_time(snapshot.created),
            snapshot.checkpoint or "-",
            snapshot.state,
            snapshot.memory,
            f"{disks} ({', '.join(sorted(kinds))})" if kinds else "-",
        ]
        rows.append(row)
    return table([Column(title) for title in titles], rows, terminal, mark=True)


def checkpoint_block(view: CheckpointView, terminal: Terminal, *, sizes: bool) -> Iterator[str]:
    """The block of ``show``: what the checkpoint is, then its disks.

    sizes -- show what was written since, which the view must have been asked for
    """
    facts = [
        ("Name", view.name),
        ("Domain", f"{view.domain.name} ({view.domain.uuid})"),
        ("Current", "yes" if view.current else "no"),
        ("Parent", "none" if view.parent is None else view.parent),
        ("Children", ", ".join(view.children) or "none"),
        ("Created", local_time(view.created)),
        ("Engine", view.engine.value),
    ]
    for title, value in facts:
        yield _fact(title, visible(value), terminal)
    first, *rest = visible_lines(view.description or "none")
    yield _fact("Description", first, terminal)
    for line in rest:
        yield " " * 14 + line
    yield ""
    yield from _disks(view.disks, terminal, sizes=sizes)


def _fact(title: str, value: str, terminal: Terminal) -> str:
    return terminal.paint(f"{title + ':':<13}", Style.STRONG) + " " + value


def _disks(disks: Sequence[DiskView], terminal: Terminal, *, sizes: bool) -> Iterator[str]:
    columns = [Column("Disk"), Column("State"), Column("Bitmap"), Column("Granularity", right=True)]
    columns.append(Column("Node"))
    if sizes:
        columns.append(Column("Dirty since", right=True))
    notes = [_note(disk) for disk in disks]
    if any(notes):
        columns.append(Column("Note"))
    rows = []
    for disk, note in zip(disks, notes, strict=True):
        row: list[str | Cell] = [
            disk.name,
            Cell(disk.state.value, STATE_STYLES[disk.state]),
            disk.bitmap or "-",
            "-" if disk.granularity is None else size(disk.granularity),
            disk.node or "-",
        ]
        if sizes:
            row.append(_dirty(disk))
        if any(notes):
            row.append(note)
        rows.append(row)
    return table(columns, rows, terminal)


def _dirty(disk: DiskView) -> str:
    if disk.bitmap is None:
        return "-"
    return "unknown" if disk.dirty_bytes is None else size(disk.dirty_bytes)


def _note(disk: DiskView) -> str:
    notes = [disk.reason] if disk.reason else []
    if disk.bitmap is not None and not disk.persistent:
        notes.append("lives as long as this QEMU process")
    return "; ".join(notes)


def diff_lines(view: DiffView, terminal: Terminal, *, extents: bool) -> Iterator[str]:
    """What changed, a row a disk; with `extents`, also where, in bytes, a table a disk."""
    columns = [
        Column("Disk"),
        Column("Size", right=True),
        Column("Changed", right=True),
        Column("Share", right=True),
        Column("Granularity", right=True),
        Column("Known"),
    ]
    yield from table(columns, [_changed(disk) for disk in view.disks], terminal)
    if not extents:
        return
    columns = [
        Column("Start", right=True),
        Column("Length", right=True),
        Column("Size", right=True),
    ]
    for disk in view.disks:
        rows = [(str(start), str(length), size(length)) for start, length in disk.extents()]
        yield ""
        yield terminal.paint(visible(disk.name), Style.STRONG) + ("" if rows else ": no change")
        if rows:
            yield from table(columns, rows, terminal)


def _changed(disk: DiskDiff) -> list[str | Cell]:
    known = Cell("yes", Style.GOOD)
    if not disk.known:
        known = Cell(f"no: {disk.reason}" if disk.reason else "no", Style.WARNING)
    return [
        disk.name,
        size(disk.size),
        size(disk.dirty_bytes),
        percent(disk.dirty_bytes, disk.size),
        "-" if disk.granularity is None else size(disk.granularity),
        known,
    ]


def plan_lines(plan: Plan, terminal: Terminal) -> Iterator[str]:
    """The plan of ``--dry-run``: engine, numbered steps, notes."""
    yield _fact("Engine", plan.engine.value, terminal)
    steps = plan.lines()
    yield _fact("Steps", "" if steps else "none", terminal).rstrip()
    digits = len(str(len(steps)))
    for number, step in enumerate(steps, 1):
        yield f"  {number:>{digits}}. {visible(step)}"
    for note in plan.notes:
        yield _fact("Note", visible(note), terminal)
    yield terminal.paint("Nothing was done.", Style.FAINT)


def findings(found: Sequence[Finding], terminal: Terminal) -> Iterator[str]:
    """What ``check`` found: for each finding a line, and below it the cure."""
    for finding in found:
        style = Style.FAINT if finding.harmless else Style.BAD
        yield f"{terminal.paint(finding.code, style)}: {visible(finding.message)}"
        yield f"  {terminal.paint('cure:', Style.STRONG)} {visible(finding.cure)}"
    wrong = sum(not finding.harmless for finding in found)
    if wrong:
        yield f"{wrong} {'finding needs' if wrong == 1 else 'findings need'} a cure."
    else:
        yield terminal.paint("consistent", Style.GOOD)


def repaired(
    cured: Sequence[Finding], left: Sequence[Finding], terminal: Terminal
) -> Iterator[str]:
    """What ``repair`` cured, and what ``check`` finds now."""
    for finding in cured:
        yield f"{terminal.paint('cured', Style.GOOD)} {finding.code}: {visible(finding.message)}"
    yield from findings(left, terminal)


def archived(gone: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A checkpoint a line, with the disks whose bitmaps ``archive`` let go."""
    for name, disks in gone.items():
        yield f"{visible(name)}: {visible(' '.join(disks))}"


def names(checkpoints: Iterable[str]) -> Iterator[str]:
    """A name a line."""
    return map(visible, checkpoints)
