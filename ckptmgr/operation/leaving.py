"""The line that a domain leaves: what was written on it lately is kept before its bitmaps go.

A revert and a restore in place both leave one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ..branch import Tails, reverted_interval, ways_out
from ..checkpoint import Interval, State
from ..dirtymap import DirtyMap
from ..domain.disk import DiskLayers
from ..errors import BitmapBroken
from ..history import History
from ..store import Loaded
from ..tails import join_maps
from ..trust import doubt
from .difference import read_bitmaps
from .returning import read
from .session import Session

log = logging.getLogger("ckptmgr")


def trackers_of(history: History, targets: Iterable[str]) -> dict[str, str]:
    """Of each disk the newest checkpoint of the current line that tracks it."""
    if history.current is None:
        return {}
    return {
        target: name
        for target in targets
        if (name := history.tracker(target, history.current)) is not None
    }


def keep_tails(
    session: Session, history: History, images: Iterable[DiskLayers]
) -> dict[str, dict[str, str | None]]:
    """What was written since each disk's newest checkpoint, kept in the store.

    images -- those that come back
    """
    present = [disk.target for disk in session.disks]
    trackers = trackers_of(history, present)
    maps = _read(session, history, trackers)
    gone = {image.target: image for image in images if image.target not in present}
    for target, name in trackers_of(history, gone).items():
        trackers[target] = name
        dirty = read(session, history, gone[target], name)
        if dirty is not None:
            maps[target] = dirty
    tails: dict[str, dict[str, str | None]] = {}
    for target, name in trackers.items():
        dirty, recorded = maps.get(target), history.get(name).disk(target)
        digest = None
        if dirty is not None and recorded is not None:
            digest = session.store.save_map(dirty.grown_from(recorded.size))
        tails.setdefault(name, {})[target] = digest
    return tails


def _read(session: Session, history: History, trackers: Mapping[str, str]) -> dict[str, DirtyMap]:
    """The bitmaps of `trackers` that can be read; a broken one costs its disk alone."""
    wanted = {
        target: name
        for target, name in trackers.items()
        if (disk := history.get(name).disk(target)) is not None
        and disk.state is State.RECORDING
        and doubt(disk, session.disks) is None
    }
    while wanted:
        try:
            return dict(read_bitmaps(session, history, wanted))
        except BitmapBroken as error:
            if error.disk not in wanted:
                raise
            log.warning("what changed on %s lately is lost: %s", error.disk, error)
            del wanted[error.disk]
    return {}


def since_parent(
    session: Session, loaded: Loaded, tails: Tails, target: str, parent: str | None
) -> Interval | None:
    """What lies between the snapshot's checkpoint and the snapshot, for a disk that goes back."""
    if parent is None:
        return None
    history = loaded.history
    ways = ways_out(history, loaded.record.tails, target, parent)
    digest = None
    if ways is not None and ways.unknown is None:
        maps = list(ways.maps)
        if ways.live:
            last = tails.get(ways.since, {}).get(target)
            maps = [] if last is None else [*maps, last]
        digest = join_maps(session.store, maps) if maps else None
    return reverted_interval(ways, digest)


def going_on(history: History, tails: Tails, target: str) -> Interval | None:
    """The open interval of a disk that the snapshot leaves alone: it goes on as it is."""
    since = None if history.current is None else history.tracker(target, history.current)
    if since is None:
        return None
    digest = tails.get(since, {}).get(target)
    return Interval(since, digest, None if digest else "its bitmap could not be read")
