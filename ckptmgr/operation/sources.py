"""Where the answer to "what changed on this disk" comes from: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import State
from ..domain.disk import Disk
from ..history import History
from ..trust import doubt


@dataclass(frozen=True)
class Source:
    """The parts whose union is the answer for one disk.

    maps -- digests of dirty maps in the store
    bitmap -- the checkpoint whose bitmap, read now, adds the open interval; None: no part of it
    broken -- why there is no answer; then the rest is empty
    """

    disk: str
    maps: tuple[str, ...] = ()
    bitmap: str | None = None
    broken: str | None = None


def closed(history: History, disk: str, start: str, end: str) -> Source:
    """What changed on `disk` between two checkpoints: from the store alone."""
    path = history.path(disk, start, end)
    if path.broken is not None:
        return Source(disk, broken=path.broken)
    return Source(disk, maps=tuple(i.map for _, i in path.intervals if i.map is not None))


def open_ended(
    history: History,
    disk: str,
    start: str,
    disks: Sequence[Disk],
    unreadable: frozenset[str] = frozenset(),
) -> Source:
    """What changed on `disk` since `start` until now.

    The closed intervals up to a checkpoint of the current line, and that one's bitmap, which
    records since: the newest for which both are known, or at last `start` itself.

    disks -- the domain's disks now
    unreadable -- checkpoints whose bitmap of this disk turned out to be broken
    """
    if history.current is None:
        return Source(disk, broken="there is no current checkpoint")
    recorded = history.get(start).disk(disk)
    if recorded is None or recorded.bitmap is None:
        reason = recorded.reason if recorded is not None else None
        return Source(disk, broken=f"{start} does not track it" + (f": {reason}" if reason else ""))
    why = ""
    for name in (history.current, *history.ancestors(history.current)):
        if not history.tracks(disk, name):
            continue
        problem = _why_unreadable(history, disk, name, disks, unreadable)
        if not problem:
            source = closed(history, disk, start, name)
            if source.broken is None:
                return Source(disk, maps=source.maps, bitmap=name)
            problem = source.broken
        why = why or problem
    return Source(disk, broken=why or f"no checkpoint of the current line tracks {disk}")


def _why_unreadable(
    history: History, disk: str, name: str, disks: Sequence[Disk], unreadable: frozenset[str]
) -> str:
    recorded = history.get(name).disk(disk)
    if recorded is None or recorded.state is not State.RECORDING:
        state = recorded.state.value if recorded is not None else "none"
        return f"the bitmap of {name} is {state}"
    suspicion = doubt(recorded, disks)
    if suspicion is not None:
        return f"the bitmap of {name} cannot be trusted: {suspicion}"
    if name not in unreadable:
        return ""
    if not recorded.persistent:
        return (
            f"the bitmap of {name} is not in the image: until that QEMU process ends, "
            "--engine monitor reads it"
        )
    return f"the bitmap of {name} is missing or broken"
