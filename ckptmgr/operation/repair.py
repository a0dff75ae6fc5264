"""repair: the cures of what check finds, one by one, each of which can be stopped anywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..checkpoint import Checkpoint, EngineName, Interval, State, archived, shown_disks
from ..consistency import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Finding,
    Forget,
    GoBack,
    MarkArchived,
    MarkBroken,
    MarkUnknown,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
    examine,
)
from ..errors import CkptmgrError, ConnectionFailed, StoreFailed
from ..history import History
from ..plan.libvirt import forget
from ..plan.steps import BackupEnd, CheckpointRedefine, Plan, Step
from . import adoption, archive, noticing, projection
from .examination import observe_all
from .recovery import require_bitmaps, settle
from .session import Session

log = logging.getLogger("ckptmgr")

ROUNDS = 1000
"""A cure may bring up another finding, and each is tried once; an end to it in any case."""


def check(session: Session) -> tuple[Finding, ...]:
    """What does not fit together.  See Domain.check."""
    with _undisturbed(session):
        return examine(observe_all(session))


@contextmanager
def _undisturbed(session: Session) -> Iterator[None]:
    """Hold the lock, so that what another process is doing is not taken for left behind."""
    if not session.store.path.exists():
        yield  # and nothing is made by looking
        return
    held = session.store.lock(session.settings.lock_timeout)
    try:
        held.__enter__()
    except StoreFailed as error:
        # A store that cannot be written: nobody else changes it either.
        log.info("%s", error)
        yield
        return
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def repair(session: Session, *, foreign: bool) -> tuple[Finding, ...]:
    """Cure what can be cured; returns the findings that were.  See Domain.repair."""
    session.require_writable()
    met: dict[Finding, None] = {}
    tried: set[Finding] = set()
    with session.store.lock(session.settings.lock_timeout):
        require_bitmaps(session)
        for _ in range(ROUNDS):
            session = session.renewed()
            found = examine(observe_all(session))
            wanted = [
                finding
                for finding in found
                if finding.curable(foreign=foreign) and finding not in tried
            ]
            met.update(dict.fromkeys(wanted))
            if not wanted:
                break
            for finding in wanted:
                tried.add(finding)
                _cure(session, finding)
                if isinstance(finding.action, Settle | Adopt | SetAside | SetCurrent | GoBack):
                    break  # what was found after it may not hold any more
        session.sweep()
    left = set(found)
    return tuple(finding for finding in met if finding not in left)


def plan_repair(session: Session, *, foreign: bool) -> Plan:
    """What repair() would do about what is there now; nothing is touched."""
    session.require_writable()
    with _undisturbed(session):
        found = [each for each in examine(observe_all(session)) if not each.harmless]
    history = session.loaded().history
    steps: list[Step] = []
    engine = EngineName.LIBVIRT if session.active else EngineName.OFFLINE
    notes = []
    for finding in found:
        notes.append(f"{finding.message}: {finding.cure}")
        if finding.action is not None and finding.curable(foreign=foreign):
            plan = _plan(session, _recorded(history, finding.action), finding.action)
            engine = plan.engine if plan.steps else engine
            steps += plan.steps
    return Plan(engine, tuple(steps), notes=tuple(notes))


def _cure(session: Session, finding: Finding) -> None:
    """One cure; if it fails, the finding stays."""
    if finding.action is None:
        return
    log.info("%s: %s", finding.message, finding.cure)
    try:
        _act(session, finding.action)
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.warning("this could not be cured: %s: %s", finding.message, error)


def _act(session: Session, action: Action) -> None:
    loaded = session.loaded()
    match action:
        case Settle():
            settle(session)
        case EndJob():
            session.release(session.place())
        case ClearWorkspace():
            session.place().clear()
        case SetAside():
            session.store.set_aside(Path(action.path))
        case SetCurrent():
            history = replace(loaded.history, current=action.checkpoint)
            session.commit_current(history, loaded.record)
        case GoBack():
            loaded = noticing.notice(session, loaded)
            if loaded.history.current != action.checkpoint:
                noticing.follow(session, loaded, action.checkpoint)
        case Adopt():
            adoption.adopt_under_lock(session, loaded)
        case _:
            # First the record: a bitmap that is not counted on any more does no harm.
            history = _recorded(loaded.history, action)
            for name, checkpoint in history.checkpoints.items():
                if checkpoint is not loaded.history.checkpoints[name]:
                    session.store.save_checkpoint(checkpoint)
            plan = _plan(session, history, action)
            session.engine(plan.engine).run(plan.steps)


def _recorded(history: History, action: Action) -> History:
    """The history with what an action records: pure."""
    match action:
        case MarkBroken():
            checkpoint = history.get(action.checkpoint)
            disks = tuple(
                replace(disk, state=State.BROKEN, reason=action.reason)
                if disk.name == action.disk
                else disk
                for disk in checkpoint.disks
            )
            return history.replace(replace(checkpoint, disks=disks))
        case MarkArchived():
            return history.replace(archived(history.get(action.checkpoint), (action.disk,)))
        case MarkUnknown():
            return history.replace(_forgotten(history.get(action.checkpoint), action))
    return history


def _forgotten(checkpoint: Checkpoint, action: MarkUnknown) -> Checkpoint:
    disks = []
    for disk in checkpoint.disks:
        if disk.name == action.disk and disk.interval is not None:
            disk = replace(disk, interval=Interval(disk.interval.since, None, action.reason))
        disks.append(disk)
    return replace(checkpoint, disks=tuple(disks))


def _plan(session: Session, history: History, action: Action) -> Plan:
    """The steps of an action, when what it records is recorded."""
    match action:
        case MarkBroken(remove=True) | MarkArchived(remove=True):
            plan = archive.removal_of(session, action.disk, action.checkpoint)
            return _with_shown(session, history, action.checkpoint, plan)
        case MarkBroken() | MarkArchived():
            plan = Plan(EngineName.LIBVIRT, ())
            return _with_shown(session, history, action.checkpoint, plan)
        case RemoveBitmap():
            return archive.removal_of(session, action.disk, action.bitmap)
        case Redefine():
            plan = Plan(EngineName.LIBVIRT, ())
            return _with_shown(session, history, action.checkpoint, plan)
        case Forget():
            return Plan(EngineName.LIBVIRT, (forget(action.checkpoint),))
        case EndJob():
            address = session.place().address
            return Plan(EngineName.LIBVIRT, () if address is None else (BackupEnd(address),))
    return Plan(EngineName.LIBVIRT, ())


def _with_shown(session: Session, history: History, name: str, plan: Plan) -> Plan:
    """`plan`, and then libvirt is shown a checkpoint as it is recorded, if it has bitmaps."""
    if not session.tells_libvirt:
        return plan
    checkpoint = history.get(name)
    if not shown_disks(checkpoint):
        return replace(plan, steps=(*plan.steps, forget(name)))
    document = projection.document(session, history, checkpoint)
    return replace(plan, steps=(*plan.steps, CheckpointRedefine(name, document)))
