"""The way to a restore point: what of the history leads there, and what would be lost on it.

It is read and kept before the images go, and the intent of a restore says how the history goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyroaring import BitMap64

from ..backup.placement import Place
from ..backup.restoring import Kept
from ..backup.staging import Staged
from ..checkpoint import EngineName, Interval
from ..dirtymap import DirtyMap, union
from ..errors import StoreDamaged
from ..history import History
from ..store import Intent, Loaded
from . import difference
from .leaving import keep_tails
from .session import Session

OPERATION = "restore"
"""Of the intent."""

NOT_KNOWN = "it was restored from a point of which the history has no checkpoint"


def is_whole(kept: Kept, places: Sequence[Place]) -> bool:
    """Whether these are all disks of the point, so that the domain goes back to it."""
    return len(places) == len(kept.manifest.disks)


def checkpoint_of(session: Session, history: History, kept: Kept) -> str | None:
    """The checkpoint of the history whose state the point is."""
    manifest = kept.manifest
    known = history.checkpoints.get(manifest.checkpoint or "")
    if (
        known is not None
        and known.created == manifest.checkpoint_created
        and manifest.domain_uuid == session.adapter.uuid
    ):
        return known.name
    found = [each for each in history.checkpoints.values() if each.point == manifest.id]
    newest = max(found, key=lambda each: each.created, default=None)
    return None if newest is None else newest.name


def intent_of(
    session: Session, loaded: Loaded, kept: Kept, done: Sequence[Staged], name: str
) -> Intent:
    """Read and keep what would be lost; say in the intent how to go on without it."""
    history = loaded.history
    whole = is_whole(kept, [each.place for each in done])
    known = checkpoint_of(session, history, kept)
    tails = keep_tails(session, history, ())
    disks: dict[str, dict[str, Any]] = {}
    for each in done:
        assert each.temporary is not None  # noqa: S101 -- they all replace files
        status = each.temporary.stat()
        old = each.place.path.stat()
        target, size = each.place.disk, each.place.size
        if whole:
            interval = _gone_back(session, history, target, known, size)
        else:
            interval = _replaced(session, history, target, known, size, tails)
        disks[target] = {
            "path": str(each.place.path),
            "temporary": str(each.temporary),
            "file": [status.st_dev, status.st_ino],
            "old": [old.st_mtime_ns, old.st_size],
            "interval": None
            if interval is None
            else {"since": interval.since, "map": interval.map, "reason": interval.reason},
        }
    return Intent(
        OPERATION,
        (name,),
        EngineName.OFFLINE.value,
        {
            "point": kept.manifest.name,
            "id": kept.manifest.id if whole else None,
            "parent": known if whole else history.current,
            "whole": whole,
            "tails": tails if whole else {},
            "disks": disks,
        },
    )


def _gone_back(
    session: Session, history: History, target: str, known: str | None, size: int
) -> Interval | None:
    """Nothing lies between the checkpoint of the point and the point."""
    if known is None:
        return None
    since = history.tracker(target, known)
    if since is None:
        return None
    recorded = history.get(since).disk(target)
    if since != known or recorded is None:
        return Interval(since, None, f"checkpoint {known} does not track {target}")
    empty = DirtyMap(recorded.granularity or 65536, size, BitMap64())
    return Interval(since, session.store.save_map(empty))


def _replaced(
    session: Session,
    history: History,
    target: str,
    known: str | None,
    size: int,
    tails: Mapping[str, Mapping[str, str | None]],
) -> Interval | None:
    """What lies between the current checkpoint and the point: the way there, and what was written
    since on the way that is left.
    """
    since = None if history.current is None else history.tracker(target, history.current)
    if since is None:
        return None
    if known is None:
        return Interval(since, None, NOT_KNOWN)
    way = difference.between(session, history, target, known, since, size)
    if way.map is None:
        return Interval(since, None, way.reason)
    digest = tails.get(since, {}).get(target)
    if digest is None:
        return Interval(since, None, f"what was written since {since} could not be read")
    try:
        written = union((way.map, session.store.read_map(digest))).resized(size)
    except StoreDamaged as error:
        return Interval(since, None, error.message)
    return Interval(since, session.store.save_map(written))
