"""What a new checkpoint records of each disk, and which maps end with it: pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..align import AlignedDisk, default_granularity, untrackable
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ..dirtymap import DirtyMap
from ..domain.disk import Disk, DiskLayers
from ..history import History
from ..plan.request import CreateDisk
from ..trust import doubt

NOT_READ = "the bitmap of {since} was missing or broken when {name} was made"
"""Why an interval is unknown as long as its map was not read."""


def create_disk(
    history: History,
    choice: AlignedDisk,
    disks: Sequence[Disk],
    layers: DiskLayers | None,
    scratch: str | None,
    unreadable: frozenset[str],
) -> CreateDisk:
    """What the planner needs to know of a tracked disk.

    disks -- of the domain, as they are now
    layers -- the bitmaps of this one; None where the engine does not look
    scratch -- path of a scratch file that may be made
    unreadable -- targets whose recording bitmap turned out to be missing or broken
    """
    since = _since(history, choice.target)
    if (
        since is None
        or choice.target in unreadable
        or not _readable(history, since, choice, disks, layers)
    ):
        return CreateDisk(choice.target, None, choice.persistent, layers=layers)
    recorded = history.get(since).disk(choice.target)
    return CreateDisk(
        target=choice.target,
        persistent=choice.persistent,
        since=since,
        since_granularity=recorded.granularity if recorded else None,
        layers=layers,
        scratch=scratch,
    )


def _since(history: History, target: str) -> str | None:
    return None if history.current is None else history.tracker(target, history.current)


def _readable(
    history: History,
    since: str,
    choice: AlignedDisk,
    disks: Sequence[Disk],
    layers: DiskLayers | None,
) -> bool:
    recorded = history.get(since).disk(choice.target)
    if recorded is None or recorded.state is not State.RECORDING or doubt(recorded, disks):
        return False
    return layers is None or layers.broken(since) is None


def recorded_disk(
    name: str, history: History, choice: AlignedDisk, disk: Disk, layers: DiskLayers | None
) -> CheckpointDisk:
    """A disk as checkpoint `name` records it; its interval is unknown until its map is read."""
    if choice.bitmap is None:
        return untracked_disk(disk, choice.reason)
    since = _since(history, choice.target)
    node = layers.layers[0].node if layers is not None else disk.format_node
    return CheckpointDisk(
        choice.target,
        bitmap=choice.bitmap,
        granularity=choice.granularity,
        node=node,
        persistent=choice.persistent,
        size=disk.size,
        source=None if disk.empty else disk.top.source,
        state=State.RECORDING,
        interval=None
        if since is None
        else Interval(since, None, NOT_READ.format(since=since, name=name)),
    )


def restored_disk(name: str, disk: Disk, interval: Interval | None = None) -> CheckpointDisk:
    """A disk of a domain that is shut off, whose new image has checkpoint `name`'s bitmap in it."""
    reason = untrackable(disk, EngineName.OFFLINE)
    if reason is not None:
        return untracked_disk(disk, reason)
    return replace(
        untracked_disk(disk, None),
        bitmap=name,
        granularity=default_granularity(disk),
        state=State.RECORDING,
        interval=interval,
    )


def untracked_disk(disk: Disk, reason: str | None) -> CheckpointDisk:
    """A disk that is left out, and why."""
    source = None if disk.empty else disk.top.source
    return CheckpointDisk(disk.target, size=disk.size, source=source, reason=reason)


def shown_disks(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Which disks libvirt is asked to track: ``("vda", "bitmap")``, ``("vdb", "no")``."""
    return [
        (disk.name, "bitmap" if disk.bitmap is not None and disk.persistent else "no")
        for disk in checkpoint.disks
    ]


def grown(
    history: History, checkpoint: Checkpoint, maps: Mapping[str, DirtyMap]
) -> dict[str, DirtyMap]:
    """`maps` with the part of each disk that was not there when its interval began."""
    return {
        name: dirty.grown_from(_size_at_start(history, checkpoint.disk(name)))
        for name, dirty in maps.items()
    }


def _size_at_start(history: History, disk: CheckpointDisk | None) -> int | None:
    if disk is None or disk.interval is None:
        return None
    since = history.get(disk.interval.since).disk(disk.name)
    return None if since is None else since.size


def with_maps(
    checkpoint: Checkpoint,
    save: Callable[[Iterable[DirtyMap]], Iterable[str]],
    maps: Mapping[str, DirtyMap],
) -> Checkpoint:
    """`checkpoint` with the digests of the maps that were read, which are kept by `save` first."""
    ended = [disk.name for disk in checkpoint.disks if disk.interval and disk.name in maps]
    if not ended:
        return checkpoint
    digests = dict(zip(ended, save(maps[name] for name in ended), strict=True))
    disks = tuple(
        replace(disk, interval=Interval(disk.interval.since, digests[disk.name]))
        if disk.interval is not None and disk.name in digests
        else disk
        for disk in checkpoint.disks
    )
    return replace(checkpoint, disks=disks)
