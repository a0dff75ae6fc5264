"""archive: old bitmaps go from QEMU and the images; their maps are in the store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from ..checkpoint import Checkpoint, State
from ..document import format_libvirt
from ..domain.known import is_known
from ..errors import BitmapBroken, CkptmgrError, InvalidRequest
from ..history import History
from ..plan import planner
from ..plan.libvirt import with_disks
from ..plan.request import DeleteDisk, DeleteRequest
from ..plan.steps import CheckpointRedefine, Plan
from ..store import Intent, Loaded
from . import projection
from .session import Session

log = logging.getLogger("ckptmgr")

Bitmaps = Mapping[str, tuple[str, ...]]
"""Checkpoints, oldest first, and of each the disks whose bitmaps are to go."""


@dataclass(frozen=True)
class Choice:
    """Which bitmaps go.

    notes -- which ones stay although they are old, and why
    """

    bitmaps: Bitmaps
    notes: tuple[str, ...]


def archive(session: Session, keep: int) -> Bitmaps:
    """Let old bitmaps go.  See Domain.archive."""
    with session.locked() as loaded:
        choice = choose(loaded.history, keep)
        for note in choice.notes:
            log.info("%s", note)
        run(session, loaded, choice.bitmaps)
        return choice.bitmaps


def plan_archive(session: Session, keep: int) -> Plan:
    """What archive() would do; nothing is touched, not even the lock."""
    session.require_writable()
    history = session.loaded().history
    choice = choose(history, keep)
    plans = [
        _plan(session, history, history.get(name), targets, frozenset())
        for name, targets in choice.bitmaps.items()
    ]
    steps = tuple(step for plan in plans for step in plan.steps)
    return Plan(session.choice.engine, steps, notes=choice.notes)


def choose(history: History, keep: int) -> Choice:
    """The bitmaps that can go when each disk keeps its `keep` newest on the current line.

    A bitmap goes only if nothing is lost with it: what changed from its checkpoint to the newest
    that tracks the disk must be known from the store.
    """
    if keep < 1:
        raise InvalidRequest(
            "at least one bitmap must stay: the one that records what changes now",
            hint="use --keep 1 or more",
        )
    going: dict[str, list[str]] = {}
    notes: list[str] = []
    for disk in _disks(history):
        line = [name for name in _line(history) if history.tracks(disk, name)]
        for name in history.topological():
            recorded = history.get(name).disk(disk)
            if recorded is None or recorded.state is not State.RECORDING or name in line[:keep]:
                continue
            # Bitmaps of other branches say nothing of their own time any more.
            broken = history.path(disk, name, line[0]).broken if name in line else None
            if broken is None:
                going.setdefault(name, []).append(disk)
            else:
                notes.append(f"the bitmap of {name} on {disk} stays: {broken}")
    order = [name for name in history.topological() if name in going]
    return Choice({name: tuple(going[name]) for name in order}, tuple(notes))


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
    except CkptmgrError:
        # Whatever has been recorded is done; the rest is as it was.
        session.store.clear_intent()
        raise


def finish(session: Session, history: History, bitmaps: Bitmaps) -> History:
    """Archive what is still to be; can be stopped at any point and called again."""
    archived: list[Checkpoint] = []
    for name, targets in bitmaps.items():
        if name not in history.checkpoints:
            continue
        checkpoint = history.get(name)
        _remove(session, history, checkpoint, targets)
        checkpoint = _archived(checkpoint, targets)
        session.store.save_checkpoint(checkpoint)
        archived.append(checkpoint)
    session.store.clear_intent()
    return reduce(History.replace, archived, history)


def _archived(checkpoint: Checkpoint, targets: Iterable[str]) -> Checkpoint:
    gone = set(targets)
    return replace(
        checkpoint,
        disks=tuple(
            replace(disk, state=State.ARCHIVED) if disk.name in gone else disk
            for disk in checkpoint.disks
        ),
    )


def _line(history: History) -> tuple[str, ...]:
    """The current line, newest first."""
    if history.current is None:
        return ()
    return (history.current, *history.ancestors(history.current))


def _disks(history: History) -> tuple[str, ...]:
    points = history.checkpoints.values()
    return tuple(dict.fromkeys(disk.name for point in points for disk in point.disks))


def _remove(
    session: Session, history: History, checkpoint: Checkpoint, targets: tuple[str, ...]
) -> None:
    missing: frozenset[str] = frozenset()
    while True:
        plan = _plan(session, history, checkpoint, targets, missing)
        try:
            session.engine(plan.engine).run(plan.steps)
        except BitmapBroken as error:
            if error.disk is None or error.disk in missing:
                raise
            missing |= {error.disk}
        else:
            return


def _plan(
    session: Session,
    history: History,
    checkpoint: Checkpoint,
    targets: tuple[str, ...],
    missing: frozenset[str],
) -> Plan:
    """Remove the bitmaps of `targets`; what other disks libvirt knows of it stays shown."""
    engine = session.choice.engine
    layers = session.layers(engine)
    present = {disk.target for disk in session.disks}
    document = format_libvirt(projection.shown(session, history, checkpoint))
    left = [
        disk.name
        for disk in checkpoint.disks
        if disk.state is State.RECORDING and disk.persistent and disk.name not in targets
    ]
    known = is_known(session.adapter, checkpoint.name)
    plan = planner(engine).delete(
        DeleteRequest(
            name=checkpoint.name,
            disks=tuple(
                DeleteDisk(target, layers.get(target), target in missing)
                for target in targets
                if target in present
            ),
            # Shown first with just these disks, so that it removes no other bitmap.
            known_to_libvirt=known and not left,
            redefinition=with_disks(document, targets),
        )
    )
    if left and known:
        shown = CheckpointRedefine(checkpoint.name, with_disks(document, left))
        plan = replace(plan, steps=(*plan.steps, shown))
    return plan
