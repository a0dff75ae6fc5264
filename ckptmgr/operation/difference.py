"""diff: what changed between two checkpoints, or since one until now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from ..align import EMPTY, READ_ONLY
from ..checkpoint import EngineName
from ..dirtymap import DirtyMap, union
from ..errors import BitmapBroken, StoreDamaged
from ..history import History
from ..plan import planner
from ..plan.request import ReadDisk, ReadRequest
from ..plan.steps import Plan
from ..views import DiffView, DiskDiff, DiskView
from . import projection
from .session import Session
from .sources import Source, closed, open_ended
from .workspace import Workspace

log = logging.getLogger("ckptmgr")


def diff(session: Session, start: str, end: str | None) -> DiffView:
    """What changed on each disk.  See Domain.diff."""
    if end is None:
        disks = _until_now(session, start)
    else:
        history = session.history()
        # Of a disk that was resized, what only one of the two has is a part of what differs.
        sizes: dict[str, int] = {}
        for name in (start, end):
            for disk in history.get(name).disks:
                if disk.bitmap is not None or disk.reason not in (EMPTY, READ_ONLY):
                    sizes[disk.name] = max(disk.size or 0, sizes.get(disk.name, 0))
        disks = tuple(
            _answer(session, history, closed(history, target, start, end), size, {})
            for target, size in sizes.items()
        )
    return DiffView(session.view, start, end, disks)


def sized(session: Session, name: str, disks: tuple[DiskView, ...]) -> tuple[DiskView, ...]:
    """`disks` of checkpoint `name` with the bytes written since, where that is known."""
    found = {disk.name: disk for disk in diff(session, name, None).disks}
    return tuple(
        replace(disk, dirty_bytes=found[disk.name].dirty_bytes)
        if disk.name in found and found[disk.name].known
        else disk
        for disk in disks
    )


def between(
    session: Session, history: History, target: str, start: str, end: str, size: int
) -> DiskDiff:
    """What changed on one disk between two checkpoints of `history`, a disk of `size` bytes now.

    `history` may have a checkpoint that is not recorded yet, if its maps are.
    """
    return _answer(session, history, closed(history, target, start, end), size, {})


def _until_now(session: Session, start: str) -> tuple[DiskDiff, ...]:
    with session.locked() as loaded:
        history = loaded.history
        history.get(start)
        sizes = {
            disk.target: disk.size or 0
            for disk in session.disks
            if not disk.empty and not disk.read_only
        }
        # A disk that is gone since is still one that the checkpoint tracks.
        for recorded in history.get(start).disks:
            if recorded.bitmap is not None:
                sizes[recorded.name] = max(recorded.size or 0, sizes.get(recorded.name, 0))
        sources, maps = _read_open(session, history, start, tuple(sizes))
        return tuple(
            _answer(session, history, source, sizes[source.disk], maps) for source in sources
        )


def _read_open(
    session: Session, history: History, start: str, disks: tuple[str, ...]
) -> tuple[list[Source], Mapping[str, DirtyMap]]:
    """Where each disk's answer comes from, and the bitmaps that were read for it.

    A bitmap that turns out to be broken is not asked again; another may serve instead.
    """
    present = {disk.target for disk in session.disks}
    unreadable: dict[str, frozenset[str]] = {}
    while True:
        sources = [
            open_ended(history, disk, start, session.disks, unreadable.get(disk, frozenset()))
            if disk in present
            else Source(disk, broken="the domain has no such disk now")
            for disk in disks
        ]
        wanted = {source.disk: source.bitmap for source in sources if source.bitmap is not None}
        try:
            return sources, read_bitmaps(session, history, wanted)
        except BitmapBroken as error:
            log.info("%s", error)
            # Where it is not told which disk it is, none can be read.
            for disk in wanted if error.disk is None else (error.disk,):
                known = unreadable.get(disk, frozenset())
                if disk not in wanted or wanted[disk] in known:
                    raise
                unreadable[disk] = known | {wanted[disk]}


def read_bitmaps(
    session: Session, history: History, wanted: Mapping[str, str]
) -> Mapping[str, DirtyMap]:
    """The bitmaps of checkpoints, `wanted` by disk, as they are now.

    Raises BitmapBroken, with the disk, if one is not what it should be.
    """
    if not wanted:
        return {}
    with session.workspace() as workspace:
        plan = _plan_read(session, history, wanted, workspace)
        engine = session.engine(plan.engine)
        try:
            return engine.run(plan.steps).maps
        except BaseException:
            engine.run(plan.undo)
            raise


def _plan_read(
    session: Session, history: History, wanted: Mapping[str, str], workspace: Workspace
) -> Plan:
    engine = session.choice.engine
    layers = session.layers(engine)
    disks = []
    for target, since in wanted.items():
        recorded = history.get(since).disk(target)
        disks.append(
            ReadDisk(
                target,
                since,
                granularity=recorded.granularity if recorded else None,
                layers=layers.get(target),
                scratch=workspace.scratch(target),
            )
        )
    socket = workspace.address if engine is not EngineName.OFFLINE else None
    plan = planner(engine).read(ReadRequest(tuple(disks), socket))
    if engine is EngineName.LIBVIRT:
        plan = projection.with_known(session, history, disks, plan)
    return plan


def _answer(
    session: Session,
    history: History,
    source: Source,
    size: int,
    read: Mapping[str, DirtyMap],
) -> DiskDiff:
    if source.broken is not None:
        return DiskDiff(source.disk, size, None, None, source.broken)
    try:
        maps = [session.store.read_map(digest) for digest in source.maps]
    except StoreDamaged as error:
        return DiskDiff(source.disk, size, None, None, error.message)
    if source.bitmap is not None:
        recorded = history.get(source.bitmap).disk(source.disk)
        maps.append(read[source.disk].grown_from(recorded.size if recorded else None))
    if not maps:
        granularity = _granularity(history, source.disk) or 65536
        return DiskDiff(
            source.disk, size, granularity, DirtyMap.from_extents(granularity, size, ())
        )
    merged = union(maps)
    merged = merged.resized(max(size, merged.size))
    return DiskDiff(source.disk, merged.size, merged.granularity, merged)


def _granularity(history: History, disk: str) -> int | None:
    found = (checkpoint.disk(disk) for checkpoint in history.checkpoints.values())
    return next((known.granularity for known in found if known and known.granularity), None)
