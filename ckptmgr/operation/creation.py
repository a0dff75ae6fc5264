"""create: a checkpoint of all disks at one instant, and the maps of the intervals that it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ..align import DiskRequest, align_disks
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, check_name
from ..dirtymap import DirtyMap
from ..document import format_libvirt, format_request
from ..domain.known import is_known, known_names, known_time
from ..errors import BitmapBroken, CheckpointExists, CkptmgrError, InvalidRequest
from ..history import History
from ..plan import planner
from ..plan.libvirt import DISCARD
from ..plan.request import CreateDisk, CreateRequest, ServeDisk, UndoRequest
from ..plan.steps import ImagesCheck, Plan, Quiesced, Server
from ..store import Intent, Loaded
from ..views import CheckpointView
from . import archive, projection
from .listing import view
from .pausing import while_standing
from .session import Session
from .tracking import create_disk, recorded_disk, shown_disks
from .workspace import Workspace

log = logging.getLogger("ckptmgr")

Served = Mapping[str, tuple[Server, str]]
"""Where the data of disks can be read: by target, the server and the name of the export."""


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str | None
    description: str | None
    disks: tuple[DiskRequest, ...]
    quiesce: bool


class Copying(Protocol):
    """Something that wants the data of disks as it is at the instant of a checkpoint.

    point -- id of the restore point that the checkpoint is to carry
    targets -- the disks whose data is wanted
    pause -- whether the guest is to stand still for that instant
    """

    point: str
    targets: tuple[str, ...]
    pause: bool

    def copy(self, history: History, checkpoint: Checkpoint, served: Served) -> None:
        """Read the data, and make the copy durable.

        history -- with the checkpoint in it, which is not recorded yet
        served -- where each disk's data is to be had, until this returns
        """
        ...

    def commit(self) -> None:
        """Make the restore point exist."""
        ...

    def withdraw(self) -> None:
        """Have it not exist: the checkpoint failed after all.  Raises nothing."""
        ...


@dataclass(frozen=True)
class Creation:
    """A checkpoint that is ready to be made.

    checkpoint -- as it will be recorded; its intervals are unknown until their maps are read
    """

    checkpoint: Checkpoint
    plan: Plan


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


def prepare(
    session: Session,
    loaded: Loaded,
    request: Request,
    workspace: Workspace,
    unreadable: frozenset[str] = frozenset(),
    *,
    copying: Copying | None = None,
) -> Creation:
    """Everything that can be refused is refused here, before anything is touched.

    unreadable -- disks whose recording bitmap turned out to be missing or broken
    copying -- what wants the data of that instant
    """
    engine = session.choice.engine
    now = int(time.time())
    name = _free_name(session, loaded, request.name, now)
    if request.quiesce and not session.active:
        raise InvalidRequest(
            f"domain {session.adapter.name!r} is not running, so there is nothing to quiesce",
            hint="leave --quiesce out",
        )
    aligned = align_disks(name, session.disks, request.disks, engine)
    layers = session.layers(engine)
    tracked = [
        create_disk(
            loaded.history,
            choice,
            session.disks,
            layers.get(choice.target),
            workspace.scratch(choice.target),
            unreadable,
        )
        for choice in aligned
        if choice.bitmap is not None
    ]
    disks = {disk.target: disk for disk in session.disks}
    checkpoint = Checkpoint(
        name=name,
        created=now,
        parent=loaded.history.current,
        engine=engine,
        disks=tuple(
            recorded_disk(
                name, loaded.history, choice, disks[choice.target], layers.get(choice.target)
            )
            for choice in aligned
        ),
        description=request.description,
        domain_xml=session.definition(),
        point=None if copying is None else copying.point,
        generation=loaded.record.generation + 1,
    )
    plan = _plan(session, loaded.history, request, checkpoint, tracked, workspace, copying)
    notes = tuple(
        f"disk {choice.target} is not tracked: {choice.reason}"
        for choice in aligned
        if choice.bitmap is None
    )
    return Creation(checkpoint, replace(plan, notes=(*plan.notes, *notes)))


def _plan(
    session: Session,
    history: History,
    request: Request,
    checkpoint: Checkpoint,
    tracked: list[CreateDisk],
    workspace: Workspace,
    copying: Copying | None,
) -> Plan:
    engine = session.choice.engine
    asked = CreateRequest(
        name=checkpoint.name,
        document=format_request(checkpoint.name, request.description, shown_disks(checkpoint)),
        redefinition=format_libvirt(projection.shown(session, history, checkpoint)),
        disks=tuple(tracked),
        socket=workspace.address if engine is not EngineName.OFFLINE else None,
        tell_libvirt=session.tells_libvirt,
        quiesce=session.settings.freeze_timeout if request.quiesce else None,
        serve=() if copying is None else serve_disks(session, copying.targets, workspace),
    )
    plan = planner(engine).create(asked)
    if engine is EngineName.LIBVIRT:
        plan = projection.with_known(session, history, tracked, plan)
    return plan


def serve_disks(
    session: Session, targets: Iterable[str], workspace: Workspace
) -> tuple[ServeDisk, ...]:
    """What the planners need to know to serve the data of disks."""
    layers = session.layers(session.choice.engine)
    disks = {disk.target: disk for disk in session.disks}
    return tuple(
        ServeDisk(
            target,
            image=disks[target].top.path,
            format=disks[target].top.format,
            layers=layers.get(target),
            scratch=workspace.scratch(target),
        )
        for target in targets
    )


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


def grown(
    history: History, checkpoint: Checkpoint, maps: Mapping[str, DirtyMap]
) -> dict[str, DirtyMap]:
    """`maps` with the part of each disk that was not there when its interval began."""
    return {
        name: dirty.grown_from(_size_at_start(history, checkpoint.disk(name)))
        for name, dirty in maps.items()
    }


def _size_at_start(history: History, disk: CheckpointDisk | None) -> int | None:
    if disk is None or disk.interval is None:
        return None
    since = history.get(disk.interval.since).disk(disk.name)
    return None if since is None else since.size


def with_maps(
    checkpoint: Checkpoint,
    save: Callable[[Iterable[DirtyMap]], Iterable[str]],
    maps: Mapping[str, DirtyMap],
) -> Checkpoint:
    """`checkpoint` with the digests of the maps that were read, which are kept by `save` first."""
    ended = [disk.name for disk in checkpoint.disks if disk.interval and disk.name in maps]
    if not ended:
        return checkpoint
    digests = dict(zip(ended, save(maps[name] for name in ended), strict=True))
    disks = tuple(
        replace(disk, interval=Interval(disk.interval.since, digests[disk.name]))
        if disk.interval is not None and disk.name in digests
        else disk
        for disk in checkpoint.disks
    )
    return replace(checkpoint, disks=disks)


def _free_name(session: Session, loaded: Loaded, asked: str | None, now: int) -> str:
    taken = {*loaded.history.checkpoints, *loaded.damaged_names}
    if asked is None:
        known = {*taken, *loaded.record.moved, *known_names(session.adapter)}
        return next(
            name for name in map(str, range(now, now + len(known) + 1)) if name not in known
        )
    check_name(asked)
    if asked == DISCARD:
        raise InvalidRequest(
            f"{DISCARD} is the name of what libvirt is shown to remove a bitmap",
            hint="choose another name",
        )
    if asked in taken:
        raise CheckpointExists(
            f"domain {session.adapter.name!r} has a checkpoint {asked!r} already",
            hint="choose another name, or delete that one first",
        )
    if asked in loaded.record.moved:
        raise CheckpointExists(
            f"domain {session.adapter.name!r} had a checkpoint {asked!r} that was deleted, and has "
            "snapshots, of which one may name it",
            hint="choose another name, or delete the snapshots first",
        )
    if is_known(session.adapter, asked):
        raise CheckpointExists(
            f"libvirt has a checkpoint {asked!r} of domain {session.adapter.name!r} already, "
            "which ckptmgr did not make",
            hint="choose another name, or take it over with `ckptmgr adopt`",
        )
    return asked
