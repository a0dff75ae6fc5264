"""The bitmaps: those that the store counts on, and those that nobody does."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint import Checkpoint, CheckpointDisk, State
from ..domain.disk import Bitmap, DiskLayers
from ..history import History
from ..trust import doubt, moved
from .findings import Finding, MarkArchived, MarkBroken, RemoveBitmap
from .observed import Observation


def recorded_bitmaps(seen: Observation, current: str | None) -> Iterator[Finding]:
    """The bitmaps that the store counts on, when `current` is current."""
    present = {disk.target for disk in seen.disks if not disk.empty} - {*seen.blind, *seen.held}
    line = _line(seen.history, current)
    for name in seen.history.topological():
        checkpoint = seen.history.get(name)
        for recorded in checkpoint.disks:
            if recorded.bitmap is not None and recorded.name in present:
                yield from _bitmap(seen, checkpoint, recorded, line)


def _line(history: History, current: str | None) -> frozenset[str]:
    """The checkpoints that lead to the current one; all of them where there is none."""
    if current is None:
        return frozenset(history.checkpoints)
    return frozenset((current, *history.ancestors(current)))


def _bitmap(
    seen: Observation, checkpoint: Checkpoint, recorded: CheckpointDisk, line: frozenset[str]
) -> Iterator[Finding]:
    name, target = checkpoint.name, recorded.name
    layers = None if seen.layers is None else seen.layers.get(target)
    if seen.layers is not None and (layers is None or not layers.layers):
        return  # an image of another machine: nobody can look
    held = layers is not None and bool(layers.holding(name))
    if recorded.state in (State.ARCHIVED, State.BROKEN):
        if held:
            yield Finding(
                "stale-bitmap",
                f"the bitmap of {name} on {target} is recorded as {recorded.state}, but is there",
                "it is removed",
                disk=target,
                checkpoint=name,
                action=RemoveBitmap(target, name, foreign=False),
            )
        return
    found = _problem(seen, checkpoint, recorded, layers)
    if found is None:
        return
    code, problem = found
    removed = "; the bitmap is removed" if held else ""
    if name not in line:
        yield Finding(
            code,
            f"the bitmap of {name} on {target} {problem}; {name} is on another branch than what "
            "is current, so nothing is lost with it",
            "that is recorded" + removed,
            disk=target,
            checkpoint=name,
            action=MarkArchived(name, target, remove=held),
        )
        return
    yield Finding(
        code,
        f"the bitmap of {name} on {target} {problem}: what changed there since {name} cannot be "
        "read from it",
        "that is recorded; the next checkpoint begins anew, and what changed before stays known"
        + removed,
        disk=target,
        checkpoint=name,
        # Without layers, nobody can tell whether the bitmap is there; libvirt then does.
        action=MarkBroken(name, target, f"its bitmap {problem}", remove=held or layers is None),
    )


def _problem(
    seen: Observation,
    checkpoint: Checkpoint,
    recorded: CheckpointDisk,
    layers: DiskLayers | None,
) -> tuple[str, str] | None:
    """The code and what is wrong with a bitmap that should be there, as a predicate."""
    name = checkpoint.name
    suspicion = doubt(recorded, seen.disks)
    if suspicion is not None:
        return suspicion.code, f"cannot be trusted: {suspicion}"
    if layers is None:
        valid = seen.sized.get(name)
        if valid is None or recorded.name in valid or not recorded.persistent:
            return None
        return "missing-bitmap", "is missing or broken"
    problem = layers.broken(name)
    holding = layers.holding(name)
    if problem is None:
        if recorded.state is not State.FROZEN:
            return None
        return "broken-bitmap", "records again, after a time in which it did not"
    if not holding:
        return _missing(seen, recorded)
    if any(_of(layer.bitmap(name)).inconsistent for layer in holding):
        return "inconsistent-bitmap", f"is {problem}: QEMU did not end in an orderly way"
    if len({layer.size for layer in holding}) > 1:
        return "layer-smaller", f"cannot be read across the backing chain: {problem}"
    return "broken-bitmap", f"is {problem}"


def _of(bitmap: Bitmap | None) -> Bitmap:
    if bitmap is None:
        raise LookupError("a layer that holds a bitmap has it")
    return bitmap


def _missing(seen: Observation, recorded: CheckpointDisk) -> tuple[str, str]:
    disk = next(disk for disk in seen.disks if disk.target == recorded.name)
    if moved(recorded, disk):
        return (
            "disk-replaced",
            f"is missing, and the disk's image is {disk.top.source} now and was {recorded.source}",
        )
    if not recorded.persistent:
        return "missing-bitmap", "is missing: it lived in the QEMU process, not in the image"
    return "missing-bitmap", "is missing"


# --- bitmaps that nobody counts on -----------------------------------------------------------


def other_bitmaps(seen: Observation) -> Iterator[Finding]:
    """Bitmaps that belong to no checkpoint."""
    known = {checkpoint.name for checkpoint in seen.known}
    taken = (known - set(seen.history.checkpoints)) | seen.damaged_names
    if seen.intent is not None:
        taken.update(seen.intent.names)
    read_only = {disk.target for disk in seen.disks if disk.read_only}
    for target, layers in (seen.layers or {}).items():
        names = dict.fromkeys(bitmap.name for layer in layers.layers for bitmap in layer.bitmaps)
        for name in names:
            counted_on = name in seen.history.checkpoints and seen.history.tracks(target, name)
            if not (counted_on or name in taken or target in read_only or _busy(layers, name)):
                yield _stranger(seen, layers, name)


def _busy(layers: DiskLayers, name: str) -> bool:
    return any(_of(layer.bitmap(name)).busy for layer in layers.holding(name))


def _stranger(seen: Observation, layers: DiskLayers, name: str) -> Finding:
    target = layers.target
    where = ", ".join(layer.image for layer in layers.holding(name))
    there = f"{target} has a bitmap {name!r} in {where}"
    if name == f"ckptmgr-{target}":
        return Finding(
            "leftover-bitmap",
            f"{there}, which an interrupted operation left behind",
            "it is removed",
            disk=target,
            action=RemoveBitmap(target, name, foreign=False),
        )
    if name.startswith("libvirt-") or name == f"backup-{target}":
        return Finding(
            "libvirt-bitmap",
            f"{there}, which libvirt made for a job",
            "none is needed: libvirt removes it, or it goes when the domain stops",
            disk=target,
            harmless=True,
        )
    if name in seen.aside:
        return Finding(
            "orphan-bitmap",
            f"{there}, of the checkpoint whose document was moved aside",
            "it is removed",
            disk=target,
            action=RemoveBitmap(target, name, foreign=False),
        )
    return Finding(
        "orphan-bitmap",
        f"{there}, which belongs to no checkpoint",
        "it is removed with --foreign, if no other tool needs it",
        disk=target,
        action=RemoveBitmap(target, name, foreign=True),
    )
