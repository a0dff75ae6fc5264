"""What libvirt is shown of the history: the store is the truth, libvirt's list follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..checkpoint import Checkpoint, EngineName
from ..document import format_libvirt
from ..domain.known import is_known, known_names, known_parent
from ..history import History
from ..plan.request import CreateDisk, ReadDisk
from ..plan.steps import CheckpointRedefine, Plan, Step
from .session import Session


def shown(session: Session, history: History, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` under the nearest of its ancestors that libvirt knows.

    libvirt takes no checkpoint whose parent it does not know.
    """
    parent = checkpoint.parent
    while parent is not None and not is_known(session.adapter, parent):
        parent = history.parent(parent) if parent in history.checkpoints else None
    return replace(checkpoint, parent=parent)


def with_known(
    session: Session, history: History, disks: Sequence[CreateDisk | ReadDisk], plan: Plan
) -> Plan:
    """`plan` with the checkpoints that its intervals start at made known to libvirt first.

    libvirt forgets them with the domain (migration, undefine, transient domains, a rename).
    """
    names = dict.fromkeys(disk.since for disk in disks if disk.since is not None)
    missing = [name for name in names if not is_known(session.adapter, name)]
    steps: list[Step] = [
        CheckpointRedefine(name, format_libvirt(shown(session, history, history.get(name))))
        for name in missing
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


def _nearest(session: Session, history: History, above: str | None, known: set[str]) -> str | None:
    passed: set[str] = set()
    while above is not None and above not in history.checkpoints:
        if above in passed or above not in known:
            return None
        passed.add(above)
        above = known_parent(session.adapter, above)
    return above
