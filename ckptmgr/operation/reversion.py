"""snapshot revert: the domain goes back in time, and its history gets a branch.

QEMU cannot load a snapshot into an image that has bitmaps (libvirt 9.0 and 11.3 kill the domain
over it), so they go first.  The order, with the domain paused from the first step to the last:

1. read what was written since the newest checkpoint, keep it; write the intent
2. remove every bitmap of ours; record them as archived, and the line as left
3. revert, paused
4. make a checkpoint of the state that came back, under the one that the snapshot's marker names
5. let the domain run, if it is to

Stopped anywhere after 1, it is completed by the next command if the domain is as it was left, so
that nothing can have been written in between; if somebody let it run, it is taken back, and what
was written is unknown.  If libvirt refuses the revert, a checkpoint of where the domain is goes on
with the present line instead; where no part of the revert can have happened, nothing is lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from ..align import align_disks
from ..branch import resolve
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ..document import format_libvirt
from ..domain import snapshots
from ..domain.power import Standstill, is_running, standstill
from ..errors import CkptmgrError, Unsupported
from ..history import History
from ..hook.departure import is_over
from ..plan.steps import Direct, Plan, Step
from ..snapshot import Kind, Snapshot
from ..store import Intent, Loaded
from ..tails import left_at
from . import archive, creation
from .leaving import going_on, keep_tails, since_parent, trackers_of
from .naming import free_name
from .pausing import go_on, stand_still
from .refusal import refuse
from .returning import removal, returning, unsure
from .session import Session

log = logging.getLogger("ckptmgr")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    run -- True: let the domain run afterwards; False: leave it paused; None: as the snapshot has it
    """

    snapshot: str
    run: bool | None = None


def revert(session: Session, request: Request) -> Checkpoint:
    """Revert to a snapshot.  See Domain.revert_snapshot."""
    with session.locked() as loaded:
        snapshot = snapshots.snapshot(session.adapter, request.snapshot)
        refuse(session, loaded, snapshot)
        parent = _parent(loaded, snapshot)
        resumes = session.active and is_running(session.adapter)
        try:
            if resumes:
                loaded = stand_still(session, loaded)
            intent = _intent(session, loaded, snapshot, parent, request, resumes)
            session.store.write_intent(intent)
        except BaseException:
            go_on(session, session.loaded())
            raise
        return _go_back(session.renewed(), intent)


def plan_revert(session: Session, request: Request) -> Plan:
    """What revert() would do; nothing is touched, not even the lock."""
    session.require_writable()
    loaded = session.loaded()
    snapshot = snapshots.snapshot(session.adapter, request.snapshot)
    refuse(session, loaded, snapshot)
    parent = _parent(loaded, snapshot)
    history = loaded.history
    paused, runs = _afterwards(snapshot, request)
    steps: list[Step] = []
    if session.active and is_running(session.adapter):
        steps.append(Direct("libvirt: pause the domain"))
    trackers = trackers_of(history, (disk.target for disk in session.disks))
    if trackers:
        shown = ", ".join(f"{target} since {name}" for target, name in trackers.items())
        steps.append(Direct(f"keep what was written: {shown}"))
    steps += archive.removal(session, history, _bitmaps(history))
    for image in returning(session, snapshot):
        steps += removal(session, image)
    state = "paused" if paused else "as it was then"
    steps.append(Direct(f"libvirt: revert to snapshot {snapshot.name}, {state}"))
    under = f"under {parent}" if parent else "as a new root"
    steps.append(Direct(f"make a checkpoint of the state that came back, {under}"))
    if runs:
        steps.append(Direct("libvirt: resume the domain"))
    return Plan(session.choice.engine, tuple(steps))


def _parent(loaded: Loaded, snapshot: Snapshot) -> str | None:
    """The checkpoint that the state that comes back is a child of."""
    parent, known = resolve(loaded.history, loaded.record.moved, snapshot.checkpoint)
    if not known:
        log.warning(
            "snapshot %s was taken at checkpoint %s, of which nothing is known any more: "
            "what is reverted to begins a history of its own",
            snapshot.name,
            snapshot.checkpoint,
        )
    return parent


def _afterwards(snapshot: Snapshot, request: Request) -> tuple[bool, bool]:
    """Whether libvirt is to revert to a paused domain, and whether that is to run then."""
    paused = request.run is not None or snapshot.starts
    return paused, request.run if request.run is not None else snapshot.state == "running"


def _intent(
    session: Session,
    loaded: Loaded,
    snapshot: Snapshot,
    parent: str | None,
    request: Request,
    resumes: bool,
) -> Intent:
    """Read and keep what would be lost; say in the intent how to go on without it."""
    history = loaded.history
    images = returning(session, snapshot)
    doubtful = unsure(session, images)
    tails = keep_tails(session, history, images)
    staying = frozenset(target for target, kind in snapshot.disks if kind is Kind.NO)
    intervals: dict[str, dict[str, str | None]] = {}
    targets = (*(disk.target for disk in session.disks), *(image.target for image in images))
    for target in dict.fromkeys(targets):
        if target in staying:
            interval = going_on(history, tails, target)
        else:
            interval = since_parent(session, loaded, tails, target, parent)
        if interval is not None and target in doubtful:
            interval = Interval(interval.since, None, "its base may have been written meanwhile")
        if interval is not None:
            intervals[target] = {
                "since": interval.since,
                "map": interval.map,
                "reason": interval.reason,
            }
    name = free_name(loaded, int(time.time()))
    paused, runs = _afterwards(snapshot, request)
    return Intent(
        "revert",
        (name,),
        session.choice.engine.value,
        {
            "snapshot": snapshot.name,
            "parent": parent,
            "left": history.current,
            "tails": tails,
            "intervals": intervals,
            "run": runs,
            "paused": paused,
            "resumes": resumes,
            "standstill": list(astuple(standstill(session.adapter))),
            "stamps": _stamps(session),
        },
    )


def _stamps(session: Session) -> dict[str, list[int]]:
    """When the images of a domain that does not run were last changed, and their sizes."""
    if session.active:
        return {}
    stamps = {}
    for disk in session.disks:
        if not disk.empty and disk.top.path is not None:
            found = Path(disk.top.path).stat()
            stamps[disk.top.path] = [found.st_mtime_ns, found.st_size]
    return stamps


def _document(session: Session, name: str) -> str:
    """What libvirt takes to remove the new checkpoint, should it be made and not recorded: of the
    disks that there are now, which may be others than before the revert.
    """
    aligned = align_disks(name, session.disks, (), session.choice.engine)
    disks = tuple(
        CheckpointDisk(disk.target, bitmap=disk.bitmap, state=State.RECORDING)
        for disk in aligned
        if disk.bitmap is not None and disk.persistent
    )
    return format_libvirt(Checkpoint(name, 1, None, session.choice.engine, disks))


def _go_back(session: Session, intent: Intent) -> Checkpoint:
    """Do what the intent says, from the removal of the bitmaps on."""
    before = standstill(session.adapter)
    data = intent.data
    try:
        _leave_line(session, intent)
        session = session.renewed()
        snapshots.revert(session.adapter, str(data["snapshot"]), paused=bool(data["paused"]))
    except CkptmgrError as error:
        log.warning("the revert failed, so the present line goes on: %s", error)
        same = before.paused and standstill(session.adapter) == before
        untouched = same and not session.adapter.reverts_in_place()
        _stay(session.renewed(), intent, untouched=untouched)
        raise
    return _came_back(session, intent)


def settle(session: Session, intent: Intent) -> None:
    """Complete or take back an interrupted revert, by what became of the domain meanwhile."""
    name = intent.names[0]
    snapshot = intent.data["snapshot"]
    if name in session.loaded().history.checkpoints:
        log.warning("completing an interrupted revert to snapshot %s", snapshot)
        _came_back(session, intent)
        return
    # Made, and not recorded: its bitmaps would be in the way.
    redefinition = {"redefinition": _document(_fitting(session), name)}
    creation.take_back(session, replace(intent, data=redefinition), name)
    now = standstill(session.adapter)
    before = Standstill(*intent.data["standstill"])
    if now.from_snapshot and now != before:
        log.warning("completing an interrupted revert to snapshot %s", snapshot)
        _came_back(session, intent)
    elif _as_it_was(session, intent, now, before):
        log.warning("completing an interrupted revert to snapshot %s", snapshot)
        _go_back(session, intent)
    else:
        # Whoever let it run since then wants to go on from there.
        log.warning(
            "taking back an interrupted revert to snapshot %s, since the domain was used "
            "meanwhile; revert again if that is still wanted",
            snapshot,
        )
        _give_up(session, intent)


def _as_it_was(session: Session, intent: Intent, now: Standstill, before: Standstill) -> bool:
    """Whether the domain is as the intent found it, and cannot have written anything since."""
    if now != before:
        return False
    return now.paused or (not session.active and _stamps(session) == intent.data["stamps"])


def _give_up(session: Session, intent: Intent) -> None:
    """The present line goes on as it is; what its bitmaps cannot tell any more is unknown."""
    loaded = session.loaded()
    record = left_at(session.store, loaded.record, intent.data["tails"])
    if record != loaded.record:
        session.store.save_record(record)
    session.clear_intent()


def _came_back(session: Session, intent: Intent) -> Checkpoint:
    """Record the state that came back, and let the domain run if it is to."""
    data = intent.data
    session = _fitting(session.renewed())
    intervals = _intervals(data["intervals"])
    return _record(session, intent.names[0], data["parent"], intervals, runs=bool(data["run"]))


def _fitting(session: Session) -> Session:
    """A session whose engine can work: the one asked for may not, if the domain was started or
    stopped by the revert.
    """
    try:
        session.choice  # noqa: B018 -- raises if it cannot be
    except Unsupported:
        return session.with_any_engine()
    return session


def _bitmaps(history: History) -> archive.Bitmaps:
    """Every bitmap that may be there."""
    return {
        name: targets
        for name in history.topological()
        if (
            targets := tuple(
                disk.name
                for disk in history.get(name).disks
                if disk.bitmap is not None and disk.state is not State.ARCHIVED
            )
        )
    }


def _leave_line(session: Session, intent: Intent) -> None:
    """Remove every bitmap of ours, and record what was written up to here."""
    loaded = session.loaded()
    record = left_at(session.store, loaded.record, intent.data["tails"])
    if record != loaded.record:
        session.store.save_record(record)
    archive.take_out(session, loaded.history, _bitmaps(loaded.history))
    for image in returning(session, snapshots.snapshot(session.adapter, intent.data["snapshot"])):
        session.engine(EngineName.OFFLINE).run(removal(session, image))
    stamps = _stamps(session)
    if stamps != intent.data["stamps"]:
        session.store.write_intent(replace(intent, data={**intent.data, "stamps": stamps}))


def _intervals(recorded: Mapping[str, Mapping[str, str | None]]) -> dict[str, Interval]:
    return {
        target: Interval(str(each["since"]), each["map"], each["reason"])
        for target, each in recorded.items()
    }


def _record(
    session: Session,
    name: str,
    parent: str | None,
    intervals: Mapping[str, Interval],
    *,
    runs: bool,
) -> Checkpoint:
    """Make checkpoint `name` of the present state under `parent`, and make it current; then let
    the domain run, if it is to.
    """
    loaded = session.loaded()
    if name in loaded.history.checkpoints:
        checkpoint = loaded.history.get(name)
    else:
        base = replace(loaded, history=replace(loaded.history, current=parent))
        checkpoint = creation.of_present_state(session, base, name, intervals)
        loaded = session.loaded()
    paused = standstill(session.adapter).instance if runs and session.active else None
    record = replace(loaded.record, paused=paused)
    record = session.commit_current(replace(loaded.history, current=name), record)
    is_over(session.store)
    session.store.clear_intent()
    go_on(session, replace(loaded, record=record))
    session.sweep()
    return checkpoint


def _stay(session: Session, intent: Intent, *, untouched: bool) -> None:
    """The revert did not happen: go on from where the domain is.

    untouched -- it is sure that not even a part of it did
    """
    data = intent.data
    left = data["left"]
    resumes = bool(data["resumes"]) and untouched
    if left is None:
        loaded = session.loaded()
        session.store.clear_intent()
        if resumes:
            go_on(session, loaded)
        else:
            session.store.save_record(replace(loaded.record, paused=None))
    else:
        reason = "its bitmap could not be read" if untouched else "a revert failed half way"
        intervals = {
            target: Interval(name, kept, None if kept else reason)
            for name, disks in data["tails"].items()
            for target, digest in disks.items()
            for kept in (digest if untouched else None,)
        }
        _record(_fitting(session), intent.names[0], left, intervals, runs=resumes)
