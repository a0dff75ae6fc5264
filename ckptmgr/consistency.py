"""check: the store against libvirt, the images, the running QEMU and the marker.  Pure.

`examine` turns what was observed into findings; each names the mismatch, what it means and its
cure, and carries the action that cures it, as data for ``repair``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .checkpoint import Checkpoint, CheckpointDisk, State
from .domain.disk import Bitmap, Disk, DiskLayers
from .domain.marker import Marker
from .history import History
from .store import Damage, DomainRecord, Intent
from .trust import doubt

# --- what repair can do ----------------------------------------------------------------------


@dataclass(frozen=True)
class Settle:
    """Complete or take back the operation whose intent was left behind."""


@dataclass(frozen=True)
class MarkBroken:
    """Record that what changed on a disk since a checkpoint is unknown; remove its bitmap."""

    checkpoint: str
    disk: str
    reason: str
    remove: bool


@dataclass(frozen=True)
class RemoveBitmap:
    """Remove a bitmap from every layer of a disk.

    foreign -- nothing says that ckptmgr made it
    """

    disk: str
    bitmap: str
    foreign: bool


@dataclass(frozen=True)
class Redefine:
    """Show libvirt a checkpoint as the store has it."""

    checkpoint: str


@dataclass(frozen=True)
class Forget:
    """Delete libvirt's metadata of a checkpoint that has no bitmap any more."""

    checkpoint: str


@dataclass(frozen=True)
class Adopt:
    """Take over libvirt's checkpoints that the store lacks."""


@dataclass(frozen=True)
class SetCurrent:
    """Make a checkpoint current in the store and in the marker."""

    checkpoint: str | None


@dataclass(frozen=True)
class EndJob:
    """End the backup job that an interrupted operation left running."""


@dataclass(frozen=True)
class ClearWorkspace:
    """Remove the socket and scratch files that an interrupted operation left behind."""


@dataclass(frozen=True)
class SetAside:
    """Move a file of the store that cannot be read out of the way, beside itself."""

    path: str


Action = (
    Settle
    | MarkBroken
    | RemoveBitmap
    | Redefine
    | Forget
    | Adopt
    | SetCurrent
    | EndJob
    | ClearWorkspace
    | SetAside
)


@dataclass(frozen=True)
class Finding:
    """One mismatch.

    message -- what is there and what it means, a sentence
    cure -- what repair does, or what the user can do
    action -- for repair; None: it needs no cure (and is then `harmless`) or a person
    harmless -- nothing is wrong; it is worth knowing
    """

    code: str
    message: str
    cure: str
    disk: str | None = None
    checkpoint: str | None = None
    action: Action | None = None
    harmless: bool = False


# --- what was observed -----------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A checkpoint as libvirt lists it: its parent, and the disks that it has a bitmap for."""

    name: str
    parent: str | None
    disks: frozenset[str]


@dataclass(frozen=True)
class Observation:
    """Everything that check looks at, of one moment.

    layers -- the bitmaps on each disk's layers; None where nobody could be asked
    sized -- without layers: the disks of each checkpoint that libvirt says are valid
    known -- libvirt's list; told -- whether libvirt is to know of checkpoints at all
    marker_set -- there is a marker, which `marker` has
    job -- a backup job of ours is running; leftovers -- files of an interrupted operation
    """

    domain: str
    active: bool
    disks: tuple[Disk, ...]
    history: History
    record: DomainRecord
    damaged: tuple[Damage, ...] = ()
    intent: Intent | None = None
    layers: Mapping[str, DiskLayers] | None = None
    sized: Mapping[str, frozenset[str]] = field(default_factory=dict)
    known: tuple[Known, ...] = ()
    told: bool = True
    marker: Marker | None = None
    job: bool = False
    leftovers: tuple[str, ...] = ()


def examine(seen: Observation) -> tuple[Finding, ...]:
    """All findings, in the order in which repair cures them."""
    return (
        *_interrupted(seen),
        *_damaged(seen),
        *_domain(seen),
        *_bitmaps(seen),
        *_strangers(seen),
        *_libvirt(seen),
        *_marker(seen),
    )


# --- the store -------------------------------------------------------------------------------


def _interrupted(seen: Observation) -> Iterator[Finding]:
    if seen.intent is not None:
        names = ", ".join(seen.intent.names)
        yield Finding(
            "intent",
            f"an interrupted {seen.intent.operation} of {names} was left behind",
            "it is completed or taken back; any command that changes something does that first",
            checkpoint=seen.intent.names[0] if seen.intent.names else None,
            action=Settle(),
        )
    if seen.job:
        yield Finding(
            "leftover-job",
            "a backup job of an interrupted operation is still running",
            "the job is ended",
            action=EndJob(),
        )
    if seen.leftovers:
        yield Finding(
            "leftover-files",
            f"files of an interrupted operation are left: {', '.join(seen.leftovers)}",
            "they are removed",
            action=ClearWorkspace(),
        )


def _damaged(seen: Observation) -> Iterator[Finding]:
    for damage in seen.damaged:
        name = damage.path.stem if damage.path.suffix == ".xml" else None
        lost = (
            f"checkpoint {name} cannot be used, and what changed up to it is unknown"
            if name is not None
            else "which checkpoint is current was read from the marker instead"
        )
        yield Finding(
            "unreadable-file",
            f"{damage.message}; {lost}",
            "put the file back from a backup; or else it is moved aside, under a name that ends "
            "in .damaged",
            checkpoint=name,
            action=SetAside(str(damage.path)),
        )


# --- the domain ------------------------------------------------------------------------------


def _domain(seen: Observation) -> Iterator[Finding]:
    if seen.record.name and seen.record.name != seen.domain:
        yield Finding(
            "renamed",
            f"the domain was called {seen.record.name!r} when its checkpoints were last changed; "
            "libvirt loses its own list when a domain is renamed",
            "the new name is recorded, and libvirt is shown the checkpoints that it lacks",
            action=SetCurrent(seen.history.current),
        )
    for disk, name, recorded in _trackers(seen):
        if recorded.size is not None and disk.size is not None and disk.size > recorded.size:
            yield Finding(
                "disk-resized",
                f"{disk.target} has grown from {recorded.size} to {disk.size} bytes since "
                f"{name}; the new part counts as changed",
                "none is needed: the next checkpoint records the new size",
                disk=disk.target,
                checkpoint=name,
                harmless=True,
            )
        layers = (seen.layers or {}).get(disk.target)
        held = layers.layers[0].node if layers is not None and layers.layers else None
        if seen.active and held is not None and recorded.node not in (None, held):
            yield Finding(
                "node-changed",
                f"the block node of {disk.target} is {held} now, and was {recorded.node} when "
                f"{name} was made; libvirt names nodes anew at each start",
                "none is needed: nodes are looked up each time",
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
        if name is not None and recorded is not None:
            yield disk, name, recorded


# --- bitmaps that the store counts on --------------------------------------------------------


def _bitmaps(seen: Observation) -> Iterator[Finding]:
    present = {disk.target for disk in seen.disks if not disk.empty}
    for name in seen.history.topological():
        checkpoint = seen.history.get(name)
        for recorded in checkpoint.disks:
            if recorded.bitmap is not None and recorded.name in present:
                yield from _bitmap(seen, checkpoint, recorded)


def _bitmap(
    seen: Observation, checkpoint: Checkpoint, recorded: CheckpointDisk
) -> Iterator[Finding]:
    name, target = checkpoint.name, recorded.name
    layers = None if seen.layers is None else seen.layers.get(target)
    if seen.layers is not None and layers is None:
        return  # a disk of another machine: nobody can look
    holding = () if layers is None else layers.holding(name)
    if recorded.state is not State.RECORDING:
        if holding:
            yield Finding(
                "stale-bitmap",
                f"the bitmap of {name} on {target} is recorded as {recorded.state}, but is there",
                "it is removed",
                disk=target,
                checkpoint=name,
                action=RemoveBitmap(target, name, foreign=False),
            )
        return
    unknown = f"so what changed on {target} since {name} is unknown"
    cure = "that is recorded; the next checkpoint begins anew, and earlier intervals stay known"
    suspicion = doubt(recorded, seen.disks)
    if suspicion is not None:
        yield Finding(
            "bitmap-lost-in-job" if "block job" in suspicion else "disk-replaced",
            f"the bitmap of {name} on {target} cannot be trusted: {suspicion}; {unknown}",
            cure + "; the bitmap is removed",
            disk=target,
            checkpoint=name,
            action=MarkBroken(name, target, suspicion, remove=bool(holding) or layers is None),
        )
        return
    code, problem = _problem(seen, checkpoint, recorded, layers)
    if problem is not None:
        yield Finding(
            code,
            f"the bitmap of {name} on {target} is {problem}, {unknown}",
            cure + ("; the bitmap is removed" if holding else ""),
            disk=target,
            checkpoint=name,
            action=MarkBroken(name, target, f"its bitmap was {problem}", remove=bool(holding)),
        )


def _problem(
    seen: Observation,
    checkpoint: Checkpoint,
    recorded: CheckpointDisk,
    layers: DiskLayers | None,
) -> tuple[str, str | None]:
    name = checkpoint.name
    if layers is None:
        valid = seen.sized.get(name)
        if valid is None or recorded.name in valid or not recorded.persistent:
            return "", None
        return "missing-bitmap", "missing or broken"
    problem = layers.broken(name)
    if problem is None:
        return "", None
    holding = layers.holding(name)
    if not holding:
        elsewhere = _source_elsewhere(seen, recorded)
        return (
            ("disk-replaced", f"missing: {elsewhere}")
            if elsewhere
            else (
                "missing-bitmap",
                "missing",
            )
        )
    if any(_of(layer.bitmap(name)).inconsistent for layer in holding):
        return "inconsistent-bitmap", problem
    if len({layer.size for layer in holding}) > 1:
        return "layer-smaller", problem
    return "broken-bitmap", problem


def _of(bitmap: Bitmap | None) -> Bitmap:
    if bitmap is None:
        raise LookupError("a layer that holds a bitmap has it")
    return bitmap


def _source_elsewhere(seen: Observation, recorded: CheckpointDisk) -> str | None:
    disk = next(disk for disk in seen.disks if disk.target == recorded.name)
    names = {name for image in disk.chain for name in (image.source, image.path)}
    if recorded.source is None or recorded.source in names:
        return None
    return f"the disk is {disk.top.source} now, and was {recorded.source}"


# --- bitmaps that nobody counts on -----------------------------------------------------------


def _strangers(seen: Observation) -> Iterator[Finding]:
    known = {checkpoint.name for checkpoint in seen.known}
    taken = {*seen.history.checkpoints, *known, *(damage.path.stem for damage in seen.damaged)}
    if seen.intent is not None:
        taken.update(seen.intent.names)
    for target, layers in (seen.layers or {}).items():
        names = dict.fromkeys(bitmap.name for layer in layers.layers for bitmap in layer.bitmaps)
        for name in names:
            if name in taken or any(_busy(layers, name)):
                continue
            ours = name == f"ckptmgr-{target}"
            yield Finding(
                "leftover-bitmap" if ours else "orphan-bitmap",
                f"{target} has a bitmap {name!r} that "
                + ("an interrupted operation left behind" if ours else "belongs to no checkpoint"),
                "it is removed"
                if ours
                else "it is removed with --foreign, if no other tool needs it",
                disk=target,
                action=RemoveBitmap(target, name, foreign=not ours),
            )


def _busy(layers: DiskLayers, name: str) -> Iterator[bool]:
    for layer in layers.holding(name):
        yield _of(layer.bitmap(name)).busy


# --- libvirt's list --------------------------------------------------------------------------


def _libvirt(seen: Observation) -> Iterator[Finding]:
    if not seen.told:
        return
    known = {checkpoint.name: checkpoint for checkpoint in seen.known}
    strangers = [name for name in known if name not in seen.history.checkpoints]
    damaged = {damage.path.stem for damage in seen.damaged}
    for name in strangers:
        if name not in damaged:
            yield Finding(
                "libvirt-only",
                f"libvirt has a checkpoint {name} that ckptmgr did not make",
                "it is taken over, as by `ckptmgr adopt`",
                checkpoint=name,
                action=Adopt(),
            )
    for name in seen.history.topological():
        shown = shown_disks(seen.history.get(name))
        if name not in known:
            if shown:
                yield Finding(
                    "store-only",
                    f"libvirt does not know checkpoint {name}",
                    "libvirt is shown it again",
                    checkpoint=name,
                    action=Redefine(name),
                )
            continue
        yield from _shown(seen, known, name, shown)


def _shown(
    seen: Observation, known: Mapping[str, Known], name: str, shown: frozenset[str]
) -> Iterator[Finding]:
    present = {disk.target for disk in seen.disks}
    if not shown:
        yield Finding(
            "libvirt-stale",
            f"libvirt lists checkpoint {name}, which has no bitmap any more",
            "libvirt's metadata of it is deleted; the store keeps it",
            checkpoint=name,
            action=Forget(name),
        )
        return
    if known[name].disks & present != shown & present:
        yield Finding(
            "libvirt-disks",
            f"libvirt's checkpoint {name} has bitmaps on "
            f"{', '.join(sorted(known[name].disks)) or 'no disk'}, and it should be "
            f"{', '.join(sorted(shown))}",
            "libvirt is shown it anew",
            checkpoint=name,
            action=Redefine(name),
        )
        return
    wanted = _shown_parent(seen.history, known, name)
    found = _through_strangers(seen.history, known, known[name].parent)
    if wanted != found:
        yield Finding(
            "wrong-parent",
            f"libvirt has {found or 'no checkpoint'} for the parent of {name}, and it should be "
            f"{wanted or 'none'}",
            "libvirt is shown it anew",
            checkpoint=name,
            action=Redefine(name),
        )


def shown_disks(checkpoint: Checkpoint) -> frozenset[str]:
    """The disks for which libvirt is to list a bitmap of a checkpoint."""
    return frozenset(
        disk.name
        for disk in checkpoint.disks
        if disk.bitmap is not None and disk.persistent and disk.state is State.RECORDING
    )


def _shown_parent(history: History, known: Mapping[str, Known], name: str) -> str | None:
    return next((above for above in history.ancestors(name) if above in known), None)


def _through_strangers(
    history: History, known: Mapping[str, Known], name: str | None
) -> str | None:
    passed: set[str] = set()
    while name is not None and name not in history.checkpoints:
        if name in passed or name not in known:
            return None
        passed.add(name)
        name = known[name].parent
    return name


# --- the marker ------------------------------------------------------------------------------


def _marker(seen: Observation) -> Iterator[Finding]:
    current, marker = seen.history.current, seen.marker
    if current is None and not seen.history.checkpoints:
        if marker is not None:
            yield Finding(
                "marker",
                f"the domain's marker names checkpoint {marker.checkpoint}, and the store has no "
                "checkpoints of it",
                "the marker is removed; if the store is the wrong one, name the right one with "
                "--store first",
                action=SetCurrent(None),
            )
        return
    if marker is None:
        yield Finding(
            "marker",
            "the domain has no marker of its current checkpoint",
            "it is set",
            checkpoint=current,
            action=SetCurrent(current),
        )
    elif marker.generation < seen.record.generation and _rolled_back(seen, marker):
        yield Finding(
            "rolled-back",
            f"the domain and its images are those of an earlier time, when {marker.checkpoint} "
            f"was current and not {current}: a snapshot of the storage was put back",
            f"{marker.checkpoint} becomes current again; the others stay, on a branch of their own",
            checkpoint=marker.checkpoint,
            action=SetCurrent(marker.checkpoint),
        )
    elif marker.checkpoint != current:
        yield Finding(
            "marker",
            f"the domain's marker names {marker.checkpoint} as current, and the store {current}",
            "the marker is set to what the store has",
            checkpoint=current,
            action=SetCurrent(current),
        )


def _rolled_back(seen: Observation, marker: Marker) -> bool:
    """Whether the bitmaps, too, are as old as the marker."""
    current = seen.history.current
    if (
        marker.checkpoint is None
        or current is None
        or marker.checkpoint not in seen.history.checkpoints
        or marker.checkpoint == current
        or seen.layers is None
    ):
        return False
    return _present(seen, marker.checkpoint) and not _present(seen, current)


def _present(seen: Observation, name: str) -> bool:
    """Whether every disk of a checkpoint that should have a valid bitmap has it."""
    wanted = [disk for disk in seen.history.get(name).disks if disk.state is State.RECORDING]
    layers = seen.layers or {}
    return bool(wanted) and all(
        disk.name in layers and layers[disk.name].broken(name) is None for disk in wanted
    )
