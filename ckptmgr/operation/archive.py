"""archive: old bitmaps go from QEMU and the images; their maps are in the store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from ..checkpoint import Checkpoint, EngineName, State, archived
from ..document import bitmap_sizes, format_libvirt
from ..domain.disk import DiskLayers
from ..domain.known import is_known, known_document
from ..errors import (
    BitmapBroken,
    CkptmgrError,
    ConnectionFailed,
    InvalidRequest,
    NoCheckpoint,
    StoreFailed,
)
from ..history import History
from ..plan import planner
from ..plan.libvirt import discard, forget, with_disks
from ..plan.request import DeleteDisk, DeleteRequest
from ..plan.steps import CheckpointRedefine, Plan, Step
from ..store import Intent, Loaded
from ..trust import doubt
from . import projection
from .session import Session

log = logging.getLogger("ckptmgr")

Bitmaps = Mapping[str, tuple[str, ...]]
"""Checkpoints, oldest first, and of each the disks whose bitmaps are to go."""

Lost = frozenset[tuple[str, str]]
"""(checkpoint, disk): bitmaps that are recorded, and turned out not to be there."""


@dataclass(frozen=True)
class Choice:
    """Which bitmaps go.

    anchors -- disk -> the checkpoint whose bitmap has what changes now; it must really be there
    notes -- which ones stay although they are old, and why
    """

    bitmaps: Bitmaps
    anchors: Mapping[str, str]
    notes: tuple[str, ...]


def archive(session: Session, keep: int) -> Bitmaps:
    """Let old bitmaps go.  See Domain.archive."""
    _check(keep)
    with session.locked() as loaded:
        choice = settled(session, loaded.history, keep)
        for note in choice.notes:
            log.warning("%s", note)
        run(session, loaded, choice.bitmaps)
        return choice.bitmaps


def plan_archive(session: Session, keep: int) -> Plan:
    """What archive() would do; nothing is touched, not even the lock."""
    _check(keep)
    session.require_writable()
    history = session.loaded().history
    choice = settled(session, history, keep)
    steps = removal(session, history, choice.bitmaps)
    return Plan(session.choice.engine, steps, notes=choice.notes)


def removal(session: Session, history: History, bitmaps: Bitmaps) -> tuple[Step, ...]:
    """The steps that take `bitmaps` out."""
    layers = session.layers(session.choice.engine)
    plans = [
        _plan(session, history, history.get(name), targets, layers)
        for name, targets in bitmaps.items()
    ]
    return tuple(step for plan in plans for step in plan.steps)


def _check(keep: int) -> None:
    if keep < 1:
        raise InvalidRequest(
            "at least one bitmap must stay: the one that records what changes now",
            hint="use --keep 1 or more",
        )


# --- which bitmaps go ------------------------------------------------------------------------


def choose(history: History, keep: int, lost: Lost = frozenset()) -> Choice:
    """The bitmaps that can go when each disk keeps its `keep` newest on the current line: pure.

    A bitmap goes only if nothing is lost with it: what changed from its checkpoint to the one
    whose bitmap still records must be known from the store.
    """
    going: dict[str, list[str]] = {}
    anchors: dict[str, str] = {}
    notes: list[str] = []
    line = _line(history)
    for disk, recording in _recording(history, lost).items():
        valid = [name for name in line if name in recording]
        old = [
            name for name in history.topological() if name in recording and name not in valid[:keep]
        ]
        if valid:
            anchors[disk] = valid[0]
        for name in old:
            reason = _needed(history, disk, name, valid[0] if valid else None)
            # What bitmaps of other branches recorded is of the current one.
            if reason is None or (valid and name not in line):
                going.setdefault(name, []).append(disk)
            else:
                notes.append(f"the bitmap of {name} on {disk} stays: {reason}")
    order = [name for name in history.topological() if name in going]
    return Choice({name: tuple(going[name]) for name in order}, anchors, tuple(notes))


def _recording(history: History, lost: Lost) -> dict[str, set[str]]:
    """The checkpoints whose bitmaps record, by disk: of a long history, few."""
    found: dict[str, set[str]] = {}
    for name, checkpoint in history.checkpoints.items():
        for disk in checkpoint.disks:
            if disk.state is State.RECORDING and (name, disk.name) not in lost:
                found.setdefault(disk.name, set()).add(name)
    return found


def _needed(history: History, disk: str, name: str, anchor: str | None) -> str | None:
    """Why a bitmap alone knows something, or None."""
    if anchor is None:
        return f"no checkpoint of the current line records what changes on {disk}"
    return history.path(disk, name, anchor).broken


def _line(history: History) -> tuple[str, ...]:
    """The current line, newest first."""
    if history.current is None:
        return ()
    return (history.current, *history.ancestors(history.current))


def settled(
    session: Session, history: History, keep: int, sure: frozenset[str] = frozenset()
) -> Choice:
    """`choose` when the bitmaps that it rests on were seen to be there.

    sure -- checkpoints whose bitmaps need not be looked for
    """
    lost: Lost = frozenset()
    while True:
        choice = choose(history, keep, lost)
        if not choice.bitmaps:
            return choice
        rests_on = {
            (name, disk)
            for targets in choice.bitmaps.values()
            for disk in targets
            if (name := choice.anchors[disk]) not in sure
        }
        found = frozenset(rests_on - _seen(session, history, rests_on))
        if not found:
            return choice
        lost |= found


def _seen(
    session: Session, history: History, wanted: Iterable[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Those of `wanted` whose bitmap can be read."""
    engine = session.choice.engine
    layers = session.layers(engine)
    sizes: dict[str, dict[str, int]] = {}
    seen = set()
    for name, disk in wanted:
        recorded = history.get(name).disk(disk)
        if recorded is None or doubt(recorded, session.disks) is not None:
            continue
        if engine is not EngineName.LIBVIRT:
            if disk in layers and layers[disk].broken(name) is None:
                seen.add((name, disk))
            continue
        if name not in sizes:
            try:
                sizes[name] = bitmap_sizes(known_document(session.adapter, name, size=True))
            except (BitmapBroken, NoCheckpoint):
                sizes[name] = {}
        if disk in sizes[name]:
            seen.add((name, disk))
    return seen


# --- how they go -----------------------------------------------------------------------------


def run(session: Session, loaded: Loaded, bitmaps: Bitmaps) -> History:
    """Archive `bitmaps`, under the lock; returns the history afterwards."""
    if not bitmaps:
        return loaded.history
    disks = {name: list(targets) for name, targets in bitmaps.items()}
    session.store.write_intent(
        Intent("archive", tuple(bitmaps), session.choice.engine.value, {"disks": disks})
    )
    try:
        return finish(session, loaded.history, bitmaps)
    except (ConnectionFailed, StoreFailed):
        raise  # what was removed may not be recorded: the next command completes it
    except CkptmgrError:
        # Whatever has been recorded is done; the rest is as it was.
        session.store.clear_intent()
        raise


def finish(session: Session, history: History, bitmaps: Bitmaps) -> History:
    """Archive what is still to be; can be stopped at any point and called again."""
    history = take_out(session, history, bitmaps)
    session.clear_intent()
    return history


def take_out(session: Session, history: History, bitmaps: Bitmaps) -> History:
    """Remove `bitmaps` and record them as archived, one checkpoint after the other."""
    changed: list[Checkpoint] = []
    layers = session.layers(session.choice.engine)
    for name, targets in bitmaps.items():
        if name not in history.checkpoints:
            continue
        checkpoint = history.get(name)
        _remove(session, history, checkpoint, targets, layers)
        checkpoint = archived(checkpoint, targets)
        session.store.save_checkpoint(checkpoint)
        changed.append(checkpoint)
    return reduce(History.replace, changed, history)


def _remove(
    session: Session,
    history: History,
    checkpoint: Checkpoint,
    targets: tuple[str, ...],
    layers: Mapping[str, DiskLayers],
) -> None:
    missing: frozenset[str] = frozenset()
    while True:
        plan = _plan(session, history, checkpoint, targets, layers, missing)
        try:
            session.engine(plan.engine).run(plan.steps)
        except BitmapBroken as error:
            if error.disk is None or error.disk in missing:
                raise
            missing |= {error.disk}
            layers = session.layers(plan.engine)
        else:
            return


def _plan(
    session: Session,
    history: History,
    checkpoint: Checkpoint,
    targets: tuple[str, ...],
    layers: Mapping[str, DiskLayers],
    missing: frozenset[str] = frozenset(),
) -> Plan:
    """Remove the bitmaps of `targets`; what other disks libvirt knows of it stays shown."""
    engine = session.choice.engine
    present = {disk.target for disk in session.disks}
    there = [target for target in targets if target in present]
    name = checkpoint.name
    known = is_known(session.adapter, name)
    document = format_libvirt(projection.shown(session, history, checkpoint))
    left = [
        disk.name
        for disk in checkpoint.disks
        if disk.state is State.RECORDING and disk.persistent and disk.name not in targets
    ]
    # Shown anew, and not deleted and made again: its children stay where they are.
    shown = (CheckpointRedefine(name, with_disks(document, left)),) if left and known else ()
    if engine is EngineName.LIBVIRT:
        if left or not known:
            return Plan(engine, (*discard(name, there), *shown))
        held = [target for target in there if target not in missing]
        if not held:
            return Plan(engine, (forget(name),))
        # Shown first with just these disks: libvirt may list others, and would fail on those.
        document = with_disks(document, held)
        disks = tuple(DeleteDisk(target) for target in held)
        return planner(engine).delete(DeleteRequest(name, disks, False, document))
    plan = planner(engine).delete(
        DeleteRequest(
            name=name,
            disks=tuple(DeleteDisk(target, layers.get(target)) for target in there),
            known_to_libvirt=known and not left,
            redefinition=document,
        )
    )
    return replace(plan, steps=(*plan.steps, *shown))


def removal_of(session: Session, target: str, bitmap: str) -> Plan:
    """Remove a bitmap; of a running domain with libvirt's own calls, where it takes them."""
    usable = (
        session.tells_libvirt
        and session.asked is not EngineName.MONITOR
        and bitmap.isprintable()  # XML takes it
    )
    if session.active and usable:
        return Plan(EngineName.LIBVIRT, discard(bitmap, (target,)))
    engine = EngineName.MONITOR if session.active else EngineName.OFFLINE
    disk = DeleteDisk(target, session.layers(engine).get(target))
    return planner(engine).delete(DeleteRequest(bitmap, (disk,), known_to_libvirt=False))
