"""What libvirt is shown of the history: the store is the truth, libvirt's list follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..checkpoint import Checkpoint, EngineName, shown_disks
from ..document import format_libvirt
from ..domain.known import is_known, known_names, known_parent
from ..history import History
from ..plan.libvirt import forget, with_disks
from ..plan.request import CreateDisk, ReadDisk
from ..plan.steps import CheckpointRedefine, Plan, Step
from .session import Session


def shown(session: Session, history: History, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` under the nearest of its ancestors that libvirt knows.

    libvirt takes no checkpoint whose parent it does not know.
    """
    parent = checkpoint.parent
    if parent is None or is_known(session.adapter, parent):
        return checkpoint
    # Archived ones are not known: there may be thousands between.
    known = set(known_names(session.adapter))
    while parent is not None and parent not in known:
        parent = history.parent(parent) if parent in history.checkpoints else None
    return replace(checkpoint, parent=parent)


def document(session: Session, history: History, checkpoint: Checkpoint) -> str:
    """What libvirt is shown of a checkpoint: of its disks, those that have a bitmap."""
    text = format_libvirt(shown(session, history, checkpoint))
    return with_disks(text, shown_disks(checkpoint))


def with_known(
    session: Session, history: History, disks: Sequence[CreateDisk | ReadDisk], plan: Plan
) -> Plan:
    """`plan` with the checkpoints that its intervals start at made known to libvirt first.

    libvirt forgets them with the domain (migration, undefine, transient domains, a rename).
    """
    names = dict.fromkeys(disk.since for disk in disks if disk.since is not None)
    missing = [name for name in names if not is_known(session.adapter, name)]
    steps: list[Step] = [
        CheckpointRedefine(name, document(session, history, history.get(name))) for name in missing
    ]
    return replace(plan, steps=(*steps, *plan.steps))


def align_parent(session: Session, history: History, checkpoint: Checkpoint) -> None:
    """See that libvirt hangs a new checkpoint where the history has it.

    libvirt keeps its current checkpoint in memory alone: after a restart of its daemon it may
    take another, or none, for the parent.  Checkpoints that the history does not have stay where
    they are: they belong to other tools.
    """
    if checkpoint.engine is not EngineName.LIBVIRT:
        return
    above = known_parent(session.adapter, checkpoint.name)
    if above == checkpoint.parent:
        return
    known = set(known_names(session.adapter))
    above = _nearest(session, history, above, known)
    wanted = shown(session, history, checkpoint)
    if above != wanted.parent:
        step = CheckpointRedefine(checkpoint.name, format_libvirt(wanted))
        session.engine(EngineName.LIBVIRT).run((step,))


def show_line(session: Session, history: History) -> None:
    """Have libvirt list the checkpoints with bitmaps of the line that is current, and of ours no
    others: it knows one line, and takes any checkpoint that it lists for the parent of the next.
    """
    if not session.tells_libvirt:
        return
    engine = session.engine(EngineName.LIBVIRT)
    current = history.current
    line = [] if current is None else [current, *history.ancestors(current)]
    bitmaps = {name for name in line if shown_disks(history.get(name))}
    known = known_names(session.adapter)
    for name in reversed(known):  # children first
        if name in history.checkpoints and name not in bitmaps:
            engine.run((forget(name),))
    for name in reversed(line):
        if name in bitmaps and name not in known:
            step = CheckpointRedefine(name, document(session, history, history.get(name)))
            engine.run((step,))


def _nearest(session: Session, history: History, above: str | None, known: set[str]) -> str | None:
    passed: set[str] = set()
    while above is not None and above not in history.checkpoints:
        if above in passed or above not in known:
            return None
        passed.add(above)
        above = known_parent(session.adapter, above)
    return above
