"""repair: the cures of what check finds, one by one, each of which can be stopped anywhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ..checkpoint import NAME_PATTERN, Checkpoint, CheckpointDisk, EngineName, State
from ..consistency import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Finding,
    Forget,
    MarkBroken,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
    examine,
    shown_disks,
)
from ..document import format_libvirt
from ..plan import planner
from ..plan.libvirt import with_disks
from ..plan.request import DeleteDisk, DeleteRequest
from ..plan.steps import BackupEnd, CheckpointDelete, CheckpointRedefine
from ..store import RECORD, Loaded
from . import adoption, projection
from .examination import observe_all
from .recovery import settle
from .session import Session

log = logging.getLogger("ckptmgr")

ROUNDS = 10
"""A cure may bring up another finding; more rounds than there are kinds would be a defect."""


def check(session: Session) -> tuple[Finding, ...]:
    """What does not fit together.  See Domain.check."""
    return examine(observe_all(session, session.loaded()))


def repair(session: Session, *, foreign: bool) -> tuple[Finding, ...]:
    """Cure what can be cured; returns the findings that were.  See Domain.repair."""
    session.require_writable()
    cured: list[Finding] = []
    with session.store.lock(session.settings.lock_timeout):
        for _ in range(ROUNDS):
            session = session.renewed()
            wanted = [finding for finding in check(session) if curable(finding, foreign=foreign)]
            if not wanted:
                break
            for finding in wanted:
                if finding.action is not None and finding not in cured:
                    _cure(session, session.loaded(), finding.action)
                    cured.append(finding)
                    if isinstance(finding.action, Settle | Adopt | SetAside):
                        break  # what was found after it may not hold any more
    return tuple(cured)


def curable(finding: Finding, *, foreign: bool) -> bool:
    """Whether repair has a cure that it may use."""
    if finding.action is None:
        return False
    return foreign or not (isinstance(finding.action, RemoveBitmap) and finding.action.foreign)


def _cure(session: Session, loaded: Loaded, action: Action) -> None:
    match action:
        case Settle():
            settle(session)
        case EndJob():
            socket = session.place().socket
            if socket is not None:
                session.engine(EngineName.LIBVIRT).run((BackupEnd(socket),))
        case ClearWorkspace():
            session.place().clear()
        case SetAside():
            session.store.set_aside(Path(action.path))
            if Path(action.path).name == RECORD:
                session.commit_current(loaded.history, loaded.record)
        case SetCurrent():
            history = replace(loaded.history, current=action.checkpoint)
            session.commit_current(history, loaded.record)
        case MarkBroken():
            _mark_broken(session, loaded, action)
        case RemoveBitmap():
            _remove(session, loaded, action.bitmap, action.disk)
        case Redefine():
            _redefine(session, loaded, action.checkpoint)
        case Forget():
            forget = CheckpointDelete(action.checkpoint, metadata_only=True, missing_ok=True)
            session.engine(EngineName.LIBVIRT).run((forget,))
        case Adopt():
            adoption.adopt_under_lock(session, loaded)


def _mark_broken(session: Session, loaded: Loaded, action: MarkBroken) -> None:
    """First the record: a bitmap that is not trusted any more does no harm."""
    checkpoint = loaded.history.get(action.checkpoint)
    disks = tuple(
        replace(disk, state=State.BROKEN, reason=action.reason)
        if disk.name == action.disk
        else disk
        for disk in checkpoint.disks
    )
    session.store.save_checkpoint(replace(checkpoint, disks=disks))
    if action.remove:
        _remove(session, session.loaded(), action.checkpoint, action.disk)


def _remove(session: Session, loaded: Loaded, bitmap: str, target: str) -> None:
    """Remove a bitmap; of a running domain with libvirt's own calls, where it takes them."""
    engine = EngineName.OFFLINE
    if session.active:
        usable = (
            session.tells_libvirt
            and session.asked is not EngineName.MONITOR
            and NAME_PATTERN.fullmatch(bitmap) is not None
        )
        engine = EngineName.LIBVIRT if usable else EngineName.MONITOR
    checkpoint = loaded.history.checkpoints.get(bitmap) or _stranger(session, bitmap)
    shown = projection.shown(session, loaded.history, checkpoint)
    layers = session.layers(engine).get(target)
    plan = planner(engine).delete(
        DeleteRequest(
            name=bitmap,
            disks=(DeleteDisk(target, layers),),
            known_to_libvirt=False,
            redefinition=with_disks(format_libvirt(_tracking(shown, target)), (target,)),
        )
    )
    session.engine(engine).run(plan.steps)
    if bitmap in loaded.history.checkpoints and session.tells_libvirt:
        _redefine(session, loaded, bitmap)


def _tracking(checkpoint: Checkpoint, target: str) -> Checkpoint:
    """`checkpoint` as if its bitmap of one disk were all it has, for libvirt to delete."""
    disk = CheckpointDisk(target, bitmap=checkpoint.name, state=State.RECORDING)
    others = (CheckpointDisk(other.name) for other in checkpoint.disks if other.name != target)
    return replace(checkpoint, disks=(disk, *others))


def _stranger(session: Session, bitmap: str) -> Checkpoint:
    disks = tuple(CheckpointDisk(disk.target) for disk in session.disks)
    return Checkpoint(bitmap, 1, None, EngineName.LIBVIRT, disks, domain_xml=session.definition())


def _redefine(session: Session, loaded: Loaded, name: str) -> None:
    """Show libvirt a checkpoint as the store has it, or forget one without bitmaps."""
    checkpoint = loaded.history.get(name)
    if not shown_disks(checkpoint):
        step = CheckpointDelete(name, metadata_only=True, missing_ok=True)
        session.engine(EngineName.LIBVIRT).run((step,))
        return
    document = format_libvirt(projection.shown(session, loaded.history, checkpoint))
    session.engine(EngineName.LIBVIRT).run((CheckpointRedefine(name, document),))
