"""create: a checkpoint of all disks at one instant, and the maps of the intervals that it ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import Checkpoint, EngineName, Interval
from ..document import format_libvirt
from ..domain.known import known_time
from ..errors import BitmapBroken, CheckpointExists, CkptmgrError
from ..history import History
from ..plan import planner
from ..plan.request import UndoRequest
from ..plan.steps import ImagesCheck, Plan, Quiesced
from ..store import Intent, Loaded
from ..views import CheckpointView
from . import archive, projection
from .listing import view
from .pausing import while_standing
from .preparation import Copying, Creation, Request, prepare
from .session import Session
from .tracking import grown, with_maps
from .workspace import Workspace

log = logging.getLogger("ckptmgr")


def create(session: Session, request: Request) -> CheckpointView:
    """Make a checkpoint.  See Domain.create."""
    with session.locked() as loaded:
        return create_under_lock(session, loaded, request)


def create_under_lock(
    session: Session, loaded: Loaded, request: Request, copying: Copying | None = None
) -> CheckpointView:
    """Make a checkpoint; the lock is held."""
    with session.workspace() as workspace:
        creation = prepare(session, loaded, request, workspace, copying=copying)
        for disk in creation.checkpoint.disks:
            if disk.bitmap is None:
                log.warning("disk %s is not tracked: %s", disk.name, disk.reason)
        checkpoint = _run(session, loaded, request, creation, workspace, copying)
        history = loaded.history.add(checkpoint)
        _tidy(session, history, checkpoint)
        history = _archive_old(session, history, loaded)
        return view(history, checkpoint, session.view)


def _tidy(session: Session, history: History, checkpoint: Checkpoint) -> None:
    """What can be left to the next command: the checkpoint stands in any case."""
    session.clear_intent()
    try:
        projection.align_parent(session, history, checkpoint)
    except CkptmgrError as error:
        log.warning("checkpoint %s is made, but: %s", checkpoint.name, error)


def _archive_old(session: Session, history: History, loaded: Loaded) -> History:
    """Let old bitmaps go if the settings say so; the new checkpoint stands in any case."""
    if not session.settings.keep_bitmaps:
        return history
    session = session.renewed()
    sure = frozenset({history.current} if history.current is not None else ())
    try:
        choice = archive.settled(session, history, session.settings.keep_bitmaps, sure)
        return archive.run(session, replace(loaded, history=history), choice.bitmaps)
    except CkptmgrError as error:
        log.warning("old bitmaps were not archived: %s", error)
        return history


def of_present_state(
    session: Session, loaded: Loaded, name: str, intervals: Mapping[str, Interval]
) -> Checkpoint:
    """Make and record a checkpoint whose intervals are known already, under the lock.

    To be made current, and covered by an intent, by the caller.
    """
    request = Request(name, None, (), quiesce=False)
    every = frozenset(disk.target for disk in session.disks)
    creation = prepare(session, loaded, request, session.place(), every)
    disks = tuple(
        replace(disk, interval=intervals.get(disk.name) if disk.bitmap else None)
        for disk in creation.checkpoint.disks
    )
    checkpoint = replace(creation.checkpoint, disks=disks)
    session.engine(creation.plan.engine).run(creation.plan.steps)
    session.store.save_checkpoint(checkpoint)
    return checkpoint


def plan_create(session: Session, request: Request) -> Plan:
    """What create() would do; nothing is touched, not even the lock."""
    session.require_writable()
    workspace = session.place()
    return prepare(session, session.loaded(), request, workspace).plan


def _run(
    session: Session,
    loaded: Loaded,
    request: Request,
    creation: Creation,
    workspace: Workspace,
    copying: Copying | None,
) -> Checkpoint:
    """Run the plan and record the checkpoint, or leave everything as it was.

    A bitmap that is not what the store says costs its disk's interval alone.
    """
    unreadable: frozenset[str] = frozenset()
    while True:
        try:
            return _attempt(session, loaded, creation, copying)
        except BitmapBroken as error:
            asked = replace(request, name=creation.checkpoint.name)
            broken = frozenset({error.disk} if error.disk else _ended(creation.checkpoint))
            if broken <= unreadable:
                raise
            unreadable |= broken
            for disk in sorted(broken):
                log.warning("what changed on %s before this checkpoint is unknown: %s", disk, error)
            creation = prepare(
                session.renewed(), loaded, asked, workspace, unreadable, copying=copying
            )


def _ended(checkpoint: Checkpoint) -> set[str]:
    return {disk.name for disk in checkpoint.disks if disk.interval is not None}


def _attempt(
    session: Session, loaded: Loaded, creation: Creation, copying: Copying | None
) -> Checkpoint:
    checkpoint, plan = creation.checkpoint, creation.plan
    engine = session.engine(plan.engine)
    # An image that is in use could not be rid of a bitmap, either: refuse it before the intent.
    engine.run([step for step in plan.steps if isinstance(step, ImagesCheck)])
    session.store.write_intent(intent(session, creation))
    try:
        if copying is not None:
            copying.expect()
        if copying is not None and copying.pause:
            run = partial(engine.run, plan.steps)
            outcome, loaded = while_standing(session, loaded, run)
        else:
            outcome = engine.run(plan.steps)
        if plan.engine is EngineName.LIBVIRT:
            # It takes the time itself; its document and ours are to say the same.
            checkpoint = replace(checkpoint, created=known_time(session.adapter, checkpoint.name))
        maps = grown(loaded.history, checkpoint, outcome.maps)
        recorded = with_maps(checkpoint, session.store.save_maps, maps)
        if copying is not None:
            copying.copy(loaded.history.add(recorded), recorded, outcome.served)
            engine.run(plan.finish)
            copying.commit()
        session.store.save_checkpoint(recorded)
        session.commit_current(loaded.history.add(recorded), loaded.record)
    except BaseException as error:
        # Also on ^C: the checkpoint is made whole or not at all, and its restore point with it.
        if copying is not None:
            copying.withdraw()
        foreign = isinstance(error, CheckpointExists)
        try:
            session.withdraw((checkpoint.name,), loaded)
            engine.run(plan.release if foreign else plan.undo)
            session.store.clear_intent()
            session.sweep()  # the maps that were read
        except CkptmgrError as failure:
            log.warning(
                "checkpoint %s could not be taken back; the next command settles it: %s",
                checkpoint.name,
                failure,
            )
        raise
    return recorded


def intent(session: Session, creation: Creation) -> Intent:
    """What is needed to take the creation back at any later time."""
    checkpoint, plan = creation.checkpoint, creation.plan
    return Intent(
        "create",
        (checkpoint.name,),
        plan.engine.value,
        {
            "redefinition": format_libvirt(replace(checkpoint, parent=None, domain_xml=None)),
            "freezes": any(isinstance(step, Quiesced) for step in plan.steps),
        },
    )


def take_back(session: Session, intent: Intent, name: str) -> None:
    """Remove whatever there is of a checkpoint that was being made, as its intent says."""
    engine = EngineName.OFFLINE
    if session.active:
        engine = EngineName.LIBVIRT if session.backup[0] else EngineName.MONITOR
    asked = EngineName(intent.engine)
    if session.active and asked is EngineName.MONITOR:
        # Bitmaps that are not persistent, and what was made for reading, only QMP shows.
        engine = EngineName.MONITOR
    steps = planner(engine).undo_create(
        UndoRequest(
            name=name,
            redefinition=str(intent.data["redefinition"]),
            disks=tuple(session.layers(engine).values()),
            socket=session.place().address if session.active else None,
            told_libvirt=session.tells_libvirt,
        )
    )
    session.engine(engine).run(steps)
