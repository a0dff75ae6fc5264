"""Images that are replaced by restored ones, and the checkpoint R of that; see restoration.py.

By the intent alone, so that whoever comes next can go on where it was ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..align import DiskRequest, untrackable
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ..document import format_libvirt
from ..engine.qemu_img import check_free
from ..errors import BitmapBroken, CkptmgrError, ConnectionFailed, StoreFailed
from ..history import History
from ..plan import planner
from ..plan.request import UndoRequest
from ..plan.steps import CheckpointRedefine
from ..store import Intent, Loaded, files
from ..tails import left_at
from . import archive, preparation, projection
from .session import Session
from .tracking import grown, restored_disk, untracked_disk, with_maps

log = logging.getLogger("ckptmgr")

_OFFLINE = EngineName.OFFLINE


def settle(session: Session, intent: Intent) -> None:
    """Complete or take back an interrupted restore, by which images are the new ones."""
    point = intent.data["point"]
    if not intent.names:
        log.warning("removing what an interrupted restore of point %s has written", point)
        for path in map(Path, intent.data["temporaries"]):
            files.remove(path, sync=False)
        session.store.clear_intent()
        return
    disks: Mapping[str, Mapping[str, Any]] = intent.data["disks"]
    recorded = intent.names[0] in session.loaded().history.checkpoints
    if recorded or any(_is(each["path"], each) for each in disks.values()):
        log.warning("completing an interrupted restore of point %s", point)
        finish(session, intent)
        return
    log.warning(
        "taking back an interrupted restore of point %s: nothing was restored; do it again if that "
        "is still wanted",
        point,
    )
    _discard(disks)
    session.store.clear_intent()


def _is(path: str, disk: Mapping[str, Any]) -> bool:
    """Whether `path` is the image that was written for the disk."""
    try:
        status = Path(path).stat()
    except OSError:
        return False
    return bool([status.st_dev, status.st_ino] == disk["file"])


def _discard(disks: Mapping[str, Mapping[str, Any]]) -> None:
    for each in disks.values():
        if _is(each["temporary"], each):
            files.remove(Path(each["temporary"]), sync=False)


def finish(session: Session, intent: Intent) -> None:
    """Do what the intent says; can be stopped at any point and called again."""
    session = session.with_any_engine()
    data, name = intent.data, intent.names[0]
    loaded = session.loaded()
    if name not in loaded.history.checkpoints:
        record = left_at(session.store, loaded.record, data["tails"])
        if record != loaded.record:
            session.store.save_record(record)
        restored = _replace_images(session, data["disks"])
        session = session.renewed()
        session.store.save_checkpoint(_checkpoint(session, session.loaded(), intent, restored))
        loaded = session.loaded()
    history = replace(loaded.history, current=name)
    session.commit_current(history, loaded.record)
    try:
        _let_go(session, history, name, None if data["whole"] else tuple(data["disks"]))
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.warning("checkpoint %s is made, but: %s", name, error)
    session.store.clear_intent()
    session.sweep()


def _replace_images(session: Session, disks: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Give the new images their names; returns the disks that have theirs."""
    restored = []
    for target, each in disks.items():
        if _is(each["path"], each):
            restored.append(target)
        elif not _is(each["temporary"], each) or not _as_it_was(session, target, each):
            log.warning(
                "disk %s of domain %s is not restored: the domain was used meanwhile",
                target,
                session.adapter.name,
            )
        else:
            files.move(Path(each["temporary"]), Path(each["path"]))
            restored.append(target)
    _discard(disks)
    return tuple(restored)


def _as_it_was(session: Session, target: str, disk: Mapping[str, Any]) -> bool:
    """Whether the old image is as it was when the intent was written, and nobody has it open."""
    if session.renewed().active:
        return False
    try:
        check_free(target, disk["path"])
        status = Path(disk["path"]).stat()
    except (CkptmgrError, OSError):
        return False
    return bool([status.st_mtime_ns, status.st_size] == disk["old"])


def _checkpoint(
    session: Session, loaded: Loaded, intent: Intent, restored: Sequence[str]
) -> Checkpoint:
    """The checkpoint R: of the restored disks, and of the others as they are."""
    data, name = intent.data, intent.names[0]
    others = _of_others(session, loaded, name, restored)
    disks = []
    for disk in session.disks:
        if disk.target in restored:
            interval = _interval(data["disks"][disk.target]["interval"])
            disks.append(restored_disk(name, disk, interval))
        elif disk.target in others:
            disks.append(others[disk.target])
        else:
            reason = untrackable(disk, _OFFLINE) or "the domain ran before it could be tracked"
            disks.append(untracked_disk(disk, reason))
    return Checkpoint(
        name,
        int(time.time()),
        data["parent"],
        EngineName.OFFLINE,
        tuple(disks),
        domain_xml=session.definition(),
        point=data["id"] if set(restored) == set(data["disks"]) else None,
    )


def _interval(recorded: Mapping[str, str | None] | None) -> Interval | None:
    if recorded is None:
        return None
    return Interval(str(recorded["since"]), recorded["map"], recorded["reason"])


def _of_others(
    session: Session, loaded: Loaded, name: str, restored: Sequence[str]
) -> dict[str, CheckpointDisk]:
    """The disks that stay as they are, each with its open interval: R's bitmap is added first, so
    that whatever is written from then on is in it.
    """
    targets = [
        disk.target
        for disk in session.disks
        if disk.target not in restored and untrackable(disk, _OFFLINE) is None
    ]
    if not targets or session.active:
        return {}
    layers = [each for each in session.layers(_OFFLINE).values() if each.target in targets]
    undo = planner(_OFFLINE).undo_create(UndoRequest(name, "", tuple(layers)))
    unreadable: frozenset[str] = frozenset()
    while True:
        engine = session.engine(_OFFLINE)
        engine.run(undo)  # of an attempt before
        session = session.renewed()
        request = preparation.Request(name, None, tuple(map(DiskRequest, targets)), quiesce=False)
        made = preparation.prepare(session, loaded, request, session.place(), unreadable)
        steps = [step for step in made.plan.steps if not isinstance(step, CheckpointRedefine)]
        try:
            maps = grown(loaded.history, made.checkpoint, engine.run(steps).maps)
        except BitmapBroken as error:
            broken = frozenset({error.disk} if error.disk else targets)
            if broken <= unreadable:
                raise
            unreadable |= broken
            continue
        recorded = with_maps(made.checkpoint, session.store.save_maps, maps)
        return {disk.name: disk for disk in recorded.disks if disk.name in targets}


def _let_go(session: Session, history: History, name: str, targets: Sequence[str] | None) -> None:
    """Record the bitmaps that went with the old images as gone, and take out those of the line
    that was left; show libvirt the line that the domain is on now.

    targets -- the disks that were restored; None: the whole line was left
    """
    bitmaps = {
        each.name: gone
        for each in (history.get(one) for one in history.topological())
        if each.name != name
        and (
            gone := tuple(
                disk.name
                for disk in each.disks
                if disk.bitmap is not None
                and disk.state is not State.ARCHIVED
                and (targets is None or disk.name in targets)
            )
        )
    }
    history = archive.take_out(session, history, bitmaps)
    checkpoint = history.get(name)
    if session.tells_libvirt:
        shown = format_libvirt(projection.shown(session, history, checkpoint))
        session.engine(session.choice.engine).run((CheckpointRedefine(name, shown),))
        projection.show_line(session, history)
