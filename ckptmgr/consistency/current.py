"""Which checkpoint is current: the store, the images and the marker against each other."""

from __future__ import annotations

from collections.abc import Iterator

from ..branch import agrees, whereabouts
from ..checkpoint import CheckpointDisk, State
from ..trust import doubt
from .findings import Finding, GoBack, SetCurrent
from .observed import Observation


def departure(seen: Observation) -> Finding | None:
    """The finding that the domain went back in time, to when another checkpoint was current."""
    back = rolled_back_to(seen)
    if back is not None:
        return Finding(
            "rolled-back",
            f"the images are those of an earlier time, when {back} was current and not "
            f"{seen.history.current}: a snapshot or copy of the storage was put back",
            f"{back} becomes current again; what came after it stays, as a branch of its own",
            checkpoint=back,
            action=GoBack(back),
        )
    if seen.intent is not None:
        return None
    current, left = seen.history.current, seen.record.left
    if left is not None:
        return Finding(
            "reverted",
            f"another tool reverted the domain to a snapshot, taken when {current or 'none'} was "
            f"current; the line up to {left} was kept, and what was written since the revert is "
            "not known",
            f"the history goes on from {current or 'a new root'}; any command that changes "
            "something does that first",
            checkpoint=current,
            action=GoBack(current),
        )
    if seen.no_marker is not None or agrees(seen.marker, seen.history, seen.record):
        return None
    found = whereabouts(seen.marker, seen.history, seen.record, lambda name: _recording(seen, name))
    if not found.went_back:
        return None
    named = f"its marker names {found.current}" if seen.marker else "it has no marker"
    return Finding(
        "reverted",
        f"the domain went back to an earlier state ({named}, and {current} was current): a "
        "snapshot was reverted, or an old definition or copy was put back; what was written since "
        "is not known",
        f"the history goes on from {found.current or 'a new root'}; what came after it stays, as "
        "a branch of its own; any command that changes something does that first",
        checkpoint=found.current,
        action=GoBack(found.current),
    )


def _recording(seen: Observation, name: str) -> bool:
    if seen.layers is not None:
        return _present(seen, name)
    wanted = {disk.name for disk in seen.history.get(name).disks if disk.state is State.RECORDING}
    return bool(wanted) and wanted <= seen.sized.get(name, frozenset())


def rolled_back_to(seen: Observation) -> str | None:
    """The checkpoint that was current when the images were as they are, if they went back in time.

    Then the bitmaps of the current checkpoint are gone from all disks, and those of that one are
    there: the marker's, or else the nearest ancestor's.  To go on from there is safe in any case,
    since they are valid.
    """
    current, marker = seen.history.current, seen.marker
    if current is None or seen.layers is None or seen.intent is not None:
        return None
    wanted = [disk for disk in seen.history.get(current).disks if disk.state is State.RECORDING]
    if not wanted or not all(_gone(seen, disk, current) for disk in wanted):
        return None
    named = None if marker is None else marker.checkpoint
    candidates = seen.history.ancestors(current)
    if named is not None and named in seen.history.checkpoints:
        candidates = (named, *candidates)
    return next((name for name in candidates if name != current and _present(seen, name)), None)


def _gone(seen: Observation, recorded: CheckpointDisk, name: str) -> bool:
    layers = (seen.layers or {}).get(recorded.name)
    return layers is not None and bool(layers.layers) and not layers.holding(name)


def _present(seen: Observation, name: str) -> bool:
    """Whether every disk of a checkpoint that should have a valid bitmap has it."""
    wanted = [disk for disk in seen.history.get(name).disks if disk.state is State.RECORDING]
    layers = seen.layers or {}
    return bool(wanted) and all(
        disk.name in layers
        and layers[disk.name].broken(name) is None
        and doubt(disk, seen.disks) is None
        for disk in wanted
    )


def marking(seen: Observation) -> Iterator[Finding]:
    """The domain's marker against the store."""
    current, marker = seen.history.current, seen.marker
    if seen.no_marker is not None:
        yield Finding(
            "unreadable-marker",
            f"the marker in the domain's metadata cannot be used: {seen.no_marker}",
            "it is set anew",
            checkpoint=current,
            action=SetCurrent(current),
        )
    elif marker is None and current is not None:
        yield Finding(
            "no-marker",
            "the domain has no marker of its current checkpoint",
            "it is set",
            checkpoint=current,
            action=SetCurrent(current),
        )
    elif marker is not None and not seen.history.checkpoints:
        yield Finding(
            "stray-marker",
            f"the domain's marker names checkpoint {marker.checkpoint}, and the store has no "
            "checkpoints of it",
            "if the store is the wrong one, name the right one with --store; or else the marker "
            "is removed",
            action=SetCurrent(None),
        )
    elif marker is not None and marker.checkpoint != current:
        older = (
            ": the store is older than the domain"
            if marker.generation > seen.record.generation
            else ""
        )
        yield Finding(
            "wrong-current",
            f"the domain's marker names {marker.checkpoint or 'no checkpoint'} as current, and "
            f"the store {current or 'none'}{older}",
            "the marker is set to what the store has",
            checkpoint=current,
            action=SetCurrent(current),
        )
