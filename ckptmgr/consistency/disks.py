"""The domain's disks against what the newest checkpoints recorded of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint import CheckpointDisk, State
from ..domain.disk import Disk
from ..trust import doubt, moved
from .findings import Finding, SetCurrent
from .observed import Observation


def domain(seen: Observation) -> Iterator[Finding]:
    """The domain's name, its images, and the disks that changed."""
    if seen.record.name and seen.record.name != seen.domain:
        yield Finding(
            "renamed",
            f"the domain was called {seen.record.name!r} when its checkpoints were last changed; "
            "libvirt loses its own list when a domain is renamed",
            "the new name is recorded, and libvirt is shown the checkpoints that it lacks",
            action=SetCurrent(seen.history.current),
        )
    for target, reason in seen.blind.items():
        yield Finding(
            "unreadable-image",
            f"the images of {target} cannot be read: {reason}",
            "bring the image back; until then, what changed between checkpoints is known, and "
            "what changed since the last one is not",
            disk=target,
        )
    for disk, name, recorded in _trackers(seen):
        if disk.target in seen.held:
            yield _held(disk.target, seen.held[disk.target])
        else:
            yield from _changes(seen, disk, name, recorded)


def _held(target: str, image: str) -> Finding:
    return Finding(
        "image-in-use",
        f"the domain does not run, and another program is writing {image} of {target}: what its "
        "bitmaps hold cannot be told",
        "end that program in an orderly way, and check again",
        disk=target,
    )


def _changes(
    seen: Observation, disk: Disk, name: str, recorded: CheckpointDisk
) -> Iterator[Finding]:
    """What changed about a disk that costs nothing."""
    layers = (seen.layers or {}).get(disk.target)
    if recorded.state is not State.RECORDING or doubt(recorded, seen.disks) is not None:
        return
    if layers is not None and layers.broken(name) is not None:
        return
    if recorded.size is not None and disk.size is not None and disk.size > recorded.size:
        yield Finding(
            "disk-resized",
            f"{disk.target} has grown from {recorded.size} to {disk.size} bytes since {name}; "
            "the new part counts as changed",
            "none is needed: the next checkpoint records the new size",
            disk=disk.target,
            checkpoint=name,
            harmless=True,
        )
    if layers is None:
        return
    node = layers.layers[0].node
    if node is not None and recorded.node not in (None, node):
        yield Finding(
            "node-changed",
            f"the block node of {disk.target} is {node} now, and was {recorded.node} when "
            f"{name} was made",
            "none is needed: nodes are looked up each time",
            disk=disk.target,
            checkpoint=name,
            harmless=True,
        )
    if moved(recorded, disk):
        yield Finding(
            "image-moved",
            f"the image of {disk.target} is {disk.top.source} now, and was {recorded.source} when "
            f"{name} was made; its bitmaps came with it",
            "none is needed, if it was moved, copied or merged; if it is another machine's "
            "image, delete the checkpoints",
            disk=disk.target,
            checkpoint=name,
            harmless=True,
        )


def _trackers(seen: Observation) -> Iterator[tuple[Disk, str, CheckpointDisk]]:
    """Of each disk the newest checkpoint on the current line that tracks it."""
    if seen.history.current is None:
        return
    for disk in seen.disks:
        name = seen.history.tracker(disk.target, seen.history.current)
        recorded = None if name is None else seen.history.get(name).disk(disk.target)
        if name is not None and recorded is not None and not disk.empty:
            yield disk, name, recorded
