"""delete: a checkpoint goes, its intervals join its children's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

from ..branch import inherit
from ..checkpoint import Checkpoint, EngineName, State
from ..dirtymap import union
from ..document import format_libvirt
from ..domain.known import is_known
from ..domain.snapshots import have_snapshots
from ..errors import (
    BitmapBroken,
    CkptmgrError,
    ConnectionFailed,
    InvalidRequest,
    OperationFailed,
    StoreDamaged,
    StoreFailed,
)
from ..history import Deletion, History, Join
from ..plan import planner
from ..plan.request import DeleteDisk, DeleteRequest
from ..plan.steps import Plan
from ..store import DomainRecord, Intent, Loaded
from ..tails import join_maps
from . import projection
from .session import Session

log = logging.getLogger("ckptmgr")


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str
    children: bool
    children_only: bool
    metadata: bool


def delete(session: Session, request: Request) -> tuple[str, ...]:
    """Delete checkpoints.  See Domain.delete."""
    with session.locked() as loaded:
        return delete_under_lock(session, loaded, request)


def delete_under_lock(session: Session, loaded: Loaded, request: Request) -> tuple[str, ...]:
    """Delete checkpoints; the lock is held."""
    deletion = loaded.history.deletion(_names(loaded.history, request))
    if not deletion.removed:
        return ()
    # Everything that can be refused is refused here.
    check_recorder(loaded.history, deletion)
    for name in deletion.removed:
        _plan(session, loaded.history, loaded.history.get(name), request.metadata)
    engine = session.choice.engine
    session.store.write_intent(
        Intent("delete", deletion.removed, engine.value, {"metadata": request.metadata})
    )
    try:
        finish(session, loaded, deletion.removed, metadata=request.metadata)
    except (ConnectionFailed, StoreFailed) as error:
        # Some of it may be gone on one side alone.
        error.hint = f"{error.hint or 'try again'}; the next command completes the deletion"
        raise
    except CkptmgrError:
        # What was deleted is gone on both sides; the rest is as it was.
        session.store.clear_intent()
        raise
    return tuple(reversed(deletion.removed))


def plan_delete(session: Session, request: Request) -> Plan:
    """What delete() would do; nothing is touched, not even the lock."""
    session.require_writable()
    history = session.loaded().history
    deletion = history.deletion(_names(history, request))
    check_recorder(history, deletion)
    plans = [
        _plan(session, history, history.get(name), request.metadata) for name in deletion.removed
    ]
    steps = tuple(step for plan in plans for step in plan.steps)
    notes = tuple(
        f"the interval of {join.disk} that {join.checkpoint} ends takes in "
        f"{len(join.maps) - 1} of the deleted ones"
        for join in deletion.joins
    )
    return Plan(session.choice.engine, steps, notes=notes)


def finish(session: Session, loaded: Loaded, names: Iterable[str], *, metadata: bool) -> None:
    """Delete what is still there of `names`, in QEMU, libvirt and the store, one by one.

    Can be stopped at any point and called again.  Children go before their parents, a
    checkpoint's bitmaps before its record; then the intervals that it started are joined, and
    its document goes when nothing stands on it.
    """
    history, record = loaded.history, loaded.record
    for name in history.deletion(name for name in names if name in history.checkpoints).removed:
        _remove(session, history, history.get(name), metadata)
        deletion = history.deletion((name,))
        settled = deletion.settled(dict(_joined(session, deletion.joins)))
        for checkpoint in settled:
            session.store.save_checkpoint(checkpoint)
        current = history.current
        if have_snapshots(session.adapter):
            record = _with_inheritance(session, history, record, name)
            session.store.save_record(record)
        history = reduce(History.replace, settled, deletion.history)
        if history.current != current:
            record = session.commit_current(history, record)
        session.store.remove_checkpoint(name)
    session.clear_intent()
    session.sweep()


def _with_inheritance(
    session: Session, history: History, record: DomainRecord, name: str
) -> DomainRecord:
    """`record` with what snapshots that name a deleted checkpoint will need."""
    left = inherit(history, record.tails, name)
    tails = {point: dict(disks) for point, disks in record.tails.items() if point != name}
    for disk, (since, maps) in left.tails.items():
        digest = None if maps is None else join_maps(session.store, maps)
        tails.setdefault(since, {})[disk] = digest
    return replace(record, tails=tails, moved={**record.moved, name: left.heir})


def _names(history: History, request: Request) -> tuple[str, ...]:
    if request.children and request.children_only:
        raise InvalidRequest("--children and --children-only exclude each other")
    below = history.descendants(request.name)
    if request.children_only:
        return below
    return (request.name, *below) if request.children else (history.get(request.name).name,)


def _plan(
    session: Session,
    history: History,
    checkpoint: Checkpoint,
    metadata: bool,
    missing: frozenset[str] = frozenset(),
) -> Plan:
    engine = session.choice.engine
    layers = session.layers(engine)
    present = {disk.target for disk in session.disks}
    tracked = [
        disk
        for disk in checkpoint.disks
        if disk.bitmap is not None
        and disk.name in present
        and disk.state is not State.ARCHIVED
        and (disk.persistent or engine is EngineName.MONITOR)
    ]
    return planner(engine).delete(
        DeleteRequest(
            name=checkpoint.name,
            disks=tuple(
                DeleteDisk(disk.name, layers.get(disk.name), disk.name in missing)
                for disk in tracked
            ),
            known_to_libvirt=is_known(session.adapter, checkpoint.name),
            redefinition=format_libvirt(projection.shown(session, history, checkpoint)),
            metadata_only=metadata,
        )
    )


def _remove(session: Session, history: History, checkpoint: Checkpoint, metadata: bool) -> None:
    missing: frozenset[str] = frozenset()
    while True:
        plan = _plan(session, history, checkpoint, metadata, missing)
        try:
            session.engine(plan.engine).run(plan.steps)
        except BitmapBroken as error:
            if error.disk is None or error.disk in missing:
                raise
            log.info("checkpoint %s has no bitmap on %s", checkpoint.name, error.disk)
            missing |= {error.disk}
        else:
            return


def _joined(session: Session, joins: Iterable[Join]) -> Iterable[tuple[Join, str]]:
    for join in joins:
        try:
            maps = [session.store.read_map(digest) for digest in join.maps]
        except StoreDamaged as error:
            log.warning(
                "what changed on %s up to checkpoint %s is unknown now: %s",
                join.disk,
                join.checkpoint,
                error,
            )
            continue
        yield join, session.store.save_map(union(maps))


def check_recorder(history: History, deletion: Deletion) -> None:
    """See that the open interval of every disk that is known stays known.

    Raises OperationFailed where the bitmap that records it would go, and that of the checkpoint
    before was archived.
    """
    if history.current is None or deletion.current is None:
        return
    for disk in {disk.name: None for point in history.checkpoints.values() for disk in point.disks}:
        recorder = history.tracker(disk, history.current)
        heir = deletion.history.tracker(disk, deletion.current)
        if recorder not in deletion.removed or heir is None:
            continue
        states = [history.get(name).disk(disk) for name in (recorder, heir)]
        if [known.state for known in states if known] != [State.RECORDING, State.ARCHIVED]:
            continue
        raise OperationFailed(
            f"checkpoint {recorder} cannot be deleted: its bitmap on {disk} is the only one that "
            f"records what changes since {heir}, whose own was archived",
            hint="create another checkpoint first, and then delete this one"
            if len(deletion.removed) == 1
            else f"create another one first and delete them one by one, or delete {heir} too",
        )
