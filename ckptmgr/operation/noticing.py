"""Noticing that the domain went back in time behind our back, by its marker.

libvirt puts the marker of a snapshot's time back with every revert, whoever reverts; and it is as
old as the rest when a domain is defined from old XML, or storage is rolled back with its XML.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from ..branch import agrees, left_unobserved, off_line, whereabouts
from ..checkpoint import Checkpoint, EngineName, State
from ..document import bitmap_sizes
from ..domain.known import known_document
from ..errors import CkptmgrError, ConnectionFailed, NoCheckpoint, StoreFailed, Unsupported
from ..history import History
from ..store import Loaded
from . import archive, projection
from .session import Session

log = logging.getLogger("ckptmgr")

UNRECORDED = "the domain went back to an earlier state, and what was written then is not recorded"


def notice(session: Session, loaded: Loaded) -> Loaded:
    """Under the lock: move the history to where the domain is, if its marker is an older one."""
    if loaded.record.left is not None:
        loaded = _take_note(session, loaded, loaded.record.left)
    history, record = loaded.history, loaded.record
    marker = session.marker()
    if agrees(marker, history, record):
        return loaded
    found = whereabouts(
        marker, history, record, lambda name: is_recording(session, history.get(name))
    )
    if not found.went_back:
        log.info("the marker of domain %s is set anew", session.adapter.name)
        return replace(loaded, record=session.commit_current(history, record))
    told_by = "its definition" if marker is None else f"its marker, which names {found.current}"
    log.warning(
        "domain %s went back to an earlier state (says %s; %s was current): the history goes on "
        "from %s, and what was written since it went back is unknown",
        session.adapter.name,
        told_by,
        history.current,
        found.current or "a new root",
    )
    if found.current in found.newer:
        log.warning("%s is the name of another checkpoint now: that one was deleted", found.current)
    if not found.known and marker is not None:
        log.warning("nothing is known of checkpoint %s any more", marker.checkpoint)
    return follow(session, loaded, found.current, found.newer)


def place(session: Session, loaded: Loaded) -> str | None:
    """The checkpoint that the domain descends from, noticed or not; nothing is changed."""
    marker = session.marker()
    if loaded.record.left is not None or agrees(marker, loaded.history, loaded.record):
        return loaded.history.current
    found = whereabouts(
        marker,
        loaded.history,
        loaded.record,
        lambda name: is_recording(session, loaded.history.get(name)),
    )
    return found.current


def follow(
    session: Session,
    loaded: Loaded,
    current: str | None,
    newer: frozenset[str] = frozenset(),
) -> Loaded:
    """Under the lock: the domain descends from `current`; the line until now was left unobserved.

    Bitmaps that do not record any more are not counted on, nor those of `newer` checkpoints, of
    which the images know nothing; those of the line that was left go, and libvirt is shown the
    line that the domain is on.
    """
    record = replace(loaded.record, tails=left_unobserved(loaded.history, loaded.record.tails))
    history = replace(loaded.history, current=current)
    history, lost = _observed(session, history, newer)
    record = session.commit_current(history, record)
    return replace(loaded, history=_settled(session, history, lost), record=record)


def _take_note(session: Session, loaded: Loaded, left: str) -> Loaded:
    """Libvirt's hook has moved the history; it may not call libvirt, so the rest is done here."""
    log.warning(
        "domain %s went back to an earlier state by a snapshot that another tool reverted to: the "
        "line up to %s is kept, the history goes on from %s, and what was written since it went "
        "back is unknown",
        session.adapter.name,
        left,
        loaded.history.current or "a new root",
    )
    history = _settled(session, *_observed(session, loaded.history))
    record = replace(loaded.record, left=None)
    session.store.save_record(record)
    return replace(loaded, history=history, record=record)


def _observed(
    session: Session, history: History, newer: frozenset[str] = frozenset()
) -> tuple[History, archive.Bitmaps]:
    """`history` with the bitmaps of the current line that do not record recorded as broken, and
    which those are.
    """
    lost: dict[str, tuple[str, ...]] = {}
    if history.current is None:
        return history, lost
    valid = _validity(session)
    for name in (history.current, *history.ancestors(history.current)):
        checkpoint = history.get(name)
        doubtful = [
            disk.name
            for disk in checkpoint.disks
            if disk.bitmap is not None
            and (disk.state is State.RECORDING or name == history.current)
        ]
        sure = valid(name) if doubtful and name not in newer else set()
        gone = [target for target in doubtful if target not in sure]
        if gone:
            lost[name] = tuple(gone)
            checkpoint = replace(
                checkpoint,
                disks=tuple(
                    replace(disk, state=State.BROKEN, reason=UNRECORDED)
                    if disk.name in gone
                    else disk
                    for disk in checkpoint.disks
                ),
            )
            session.store.save_checkpoint(checkpoint)
            history = history.replace(checkpoint)
    return history, lost


def _settled(session: Session, history: History, lost: archive.Bitmaps) -> History:
    """What can be left to `repair`: bitmaps of other lines and those that do not record go, and
    libvirt is shown this line.
    """
    try:
        history = archive.take_out(session.renewed(), history, off_line(history))
        for name, targets in lost.items():
            for target in targets:
                plan = archive.removal_of(session.renewed(), target, name)
                session.engine(plan.engine).run(plan.steps)
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.info("bitmaps that nobody counts on any more stay: %s", error)
        history = replace(session.store.load().history, current=history.current)
    try:
        projection.show_line(session, history)
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.info("libvirt is not shown the present line: %s", error)
    return history


def is_recording(session: Session, checkpoint: Checkpoint) -> bool:
    """Whether every bitmap that a checkpoint should have is there and records."""
    wanted = {
        disk.name
        for disk in checkpoint.disks
        if disk.bitmap is not None and disk.state is State.RECORDING
    }
    return bool(wanted) and wanted <= _validity(session)(checkpoint.name)


def _validity(session: Session) -> Callable[[str], set[str]]:
    """Of a checkpoint, the disks on which its bitmap is there and records."""
    try:
        engine = session.choice.engine
        layers = session.layers(engine)
    except Unsupported:
        return lambda _: set()

    def valid(name: str) -> set[str]:
        if engine is not EngineName.LIBVIRT:
            return {target for target in layers if layers[target].broken(name) is None}
        try:
            return set(bitmap_sizes(known_document(session.adapter, name, size=True)))
        except NoCheckpoint:
            return set()

    return valid
