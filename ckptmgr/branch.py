"""Alternate histories: what a revert makes of the tree.  Pure.

A snapshot carries the marker of its time, which names the checkpoint P that was current then.
After a revert to it the disks hold what they held at the snapshot S; a new checkpoint R is made
for that state, as a child of P.  Its interval P..R is the one P..S, and S lies on one of P's ways
out: on an interval to a child of P, or between P and the moment at which P's line was left by a
revert (its *tail*), or, if P is current still, in the open interval.  The union of all of them has
every granule written between P and S, so that the rule holds: what differs between two
checkpoints is contained in the union of the dirty maps between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoint import Interval, State
from .history import History
from .marker import Marker

if TYPE_CHECKING:
    from .store import DomainRecord

Tails = Mapping[str, Mapping[str, str | None]]
"""Of checkpoints whose line was left: by disk the digest of the map until then, None: unknown."""


@dataclass(frozen=True)
class WaysOut:
    """What was written after a checkpoint on any line that starts at it, for one disk.

    since -- the checkpoint; the nearest one at or above the marker's that tracks the disk
    maps -- digests of dirty maps
    live -- the open interval, read from the bitmap of `since`, is one of them
    unknown -- why it is not known, or None
    """

    since: str
    maps: tuple[str, ...] = ()
    live: bool = False
    unknown: str | None = None


def ways_out(history: History, tails: Tails, disk: str, parent: str) -> WaysOut | None:
    """All ways out of `parent` for `disk`; None if nothing at or above it tracks the disk."""
    since = history.tracker(disk, parent)
    if since is None:
        return None
    maps: list[str] = []
    for name, checkpoint in history.checkpoints.items():
        recorded = checkpoint.disk(disk)
        if recorded is None or recorded.interval is None or recorded.interval.since != since:
            continue
        if recorded.interval.map is None:
            reason = recorded.interval.reason or f"the map of the interval up to {name} is lost"
            return WaysOut(since, unknown=reason)
        maps.append(recorded.interval.map)
    tail = tails.get(since, {})
    if disk in tail:
        digest = tail[disk]
        if digest is None:
            return WaysOut(since, unknown=f"the line that started at {since} was left unobserved")
        maps.append(digest)
    live = history.current is not None and history.tracker(disk, history.current) == since
    return WaysOut(since, tuple(dict.fromkeys(maps)), live)


def resolve(
    history: History, moved: Mapping[str, str | None], name: str | None
) -> tuple[str | None, bool]:
    """The checkpoint that a marker means now, and whether it is known which that is.

    A checkpoint that was deleted since stands for its nearest ancestor that stayed.
    """
    passed: set[str] = set()
    while name is not None and name not in history.checkpoints:
        if name in passed or name not in moved:
            return None, False
        passed.add(name)
        name = moved[name]
    return name, True


def reverted_interval(ways: WaysOut | None, digest: str | None) -> Interval | None:
    """The interval that R ends on a disk, `digest` being the map of the union of `ways`."""
    if ways is None:
        return None
    if ways.unknown is not None or digest is None:
        return Interval(ways.since, None, ways.unknown or "the line that was left is not known")
    return Interval(ways.since, digest)


@dataclass(frozen=True)
class Inheritance:
    """What has to be kept of a deleted checkpoint for the snapshots that may name it.

    heir -- the ancestor that stands for it from now on
    tails -- by disk: the checkpoint whose tail takes in `maps` (None: that is unknown then)
    """

    heir: str | None
    tails: Mapping[str, tuple[str, tuple[str, ...] | None]]


def inherit(history: History, tails: Tails, name: str) -> Inheritance:
    """What `name` leaves when it is deleted, its children and their intervals apart.

    A snapshot may lie between two checkpoints of which the later one goes: then what was written
    up to it would be on no way out any more.
    """
    checkpoint = history.get(name)
    left: dict[str, tuple[str, tuple[str, ...] | None]] = {}
    for disk in checkpoint.disks:
        if disk.bitmap is None or disk.interval is None:
            continue
        since = disk.interval.since
        parts = [disk.interval.map]
        for tail in (tails.get(name, {}), tails.get(since, {})):
            if disk.name in tail:
                parts.append(tail[disk.name])
        known = tuple(part for part in parts if part is not None)
        left[disk.name] = (since, known if len(known) == len(parts) else None)
    return Inheritance(history.parent(name), left)


def written_since(
    history: History, parent: str | None, created: int, tops: Iterable[str]
) -> frozenset[str]:
    """Images that were a disk's top one after a snapshot was taken, and so may have been written.

    parent, created -- the snapshot's checkpoint and time
    tops -- the top images now

    A checkpoint that is older than one before it was made after the clock was put back, and perhaps
    after the snapshot.
    """
    before = () if parent is None else (parent, *history.ancestors(parent))
    return frozenset(tops).union(
        disk.source
        for name, checkpoint in history.checkpoints.items()
        if name not in before
        and (checkpoint.created >= created or checkpoint.created < history.times[name])
        for disk in checkpoint.disks
        if disk.source is not None
    )


# --- where the domain is ----------------------------------------------------------------------


@dataclass(frozen=True)
class Whereabouts:
    """What the domain's marker says against the store.

    current -- the checkpoint that the domain descends from
    went_back -- it is not the one that the store has; else, the marker alone is an old one
    known -- whether the store has the checkpoint that the marker names, or its heir
    newer -- checkpoints that were made after the marker was set: bitmaps of their names in images
             that went back with it are of others, which were deleted
    """

    current: str | None
    went_back: bool
    known: bool = True
    newer: frozenset[str] = frozenset()


def agrees(marker: Marker | None, history: History, record: DomainRecord) -> bool:
    """Whether the marker says what the store does."""
    if not history.checkpoints or not record.name:
        return True
    return marker == Marker(history.current, record.generation) or (
        marker is None and history.current is None
    )


def whereabouts(
    marker: Marker | None,
    history: History,
    record: DomainRecord,
    recording: Callable[[str], bool],
) -> Whereabouts:
    """Where the domain is when its marker and the store do not agree.

    recording -- whether all bitmaps that a checkpoint should have are there and record: if those
                 of the current one do, only the definition is an old one
    """
    target, known = resolve(history, record.moved, marker.checkpoint if marker else None)
    newer = made_after(history, marker)
    if target == history.current and target not in newer:
        return Whereabouts(target, went_back=False)
    if target != history.current and history.current is not None and recording(history.current):
        return Whereabouts(history.current, went_back=False)
    return Whereabouts(target, True, known or marker is None, newer)


def made_after(history: History, marker: Marker | None) -> frozenset[str]:
    """The checkpoints that were made after a marker was set."""
    if marker is None:
        return frozenset()
    return frozenset(
        name
        for name, checkpoint in history.checkpoints.items()
        if checkpoint.generation is not None and checkpoint.generation > marker.generation
    )


def left_unobserved(history: History, tails: Tails) -> dict[str, dict[str, str | None]]:
    """`tails` when the present line was left, and nobody knows what was written until then."""
    merged = {name: dict(disks) for name, disks in tails.items()}
    if history.current is None:
        return merged
    for disk in dict.fromkeys(d.name for c in history.checkpoints.values() for d in c.disks):
        tracker = history.tracker(disk, history.current)
        if tracker is not None:
            merged.setdefault(tracker, {})[disk] = None
    return merged


def off_line(history: History) -> dict[str, tuple[str, ...]]:
    """The checkpoints that do not lead to the current one, and their disks that still count on a
    bitmap: what is written now is not theirs.
    """
    line = (
        set() if history.current is None else {history.current, *history.ancestors(history.current)}
    )
    return {
        name: disks
        for name in history.topological()
        if name not in line
        and (
            disks := tuple(
                disk.name
                for disk in history.get(name).disks
                if disk.bitmap is not None and disk.state is not State.ARCHIVED
            )
        )
    }
