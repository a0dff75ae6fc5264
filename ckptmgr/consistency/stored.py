"""The store in itself, and what interrupted operations left beside it."""

from __future__ import annotations

from collections.abc import Iterator

from ..store import INTENT, RECORD
from .findings import ClearWorkspace, EndJob, Finding, MarkUnknown, SetAside, SetCurrent, Settle
from .observed import Observation


def interrupted(seen: Observation) -> Iterator[Finding]:
    """What an interrupted operation left."""
    if seen.intent is not None:
        names = f" of {', '.join(seen.intent.names)}" if seen.intent.names else ""
        yield Finding(
            "intent",
            f"an interrupted {seen.intent.operation}{names} was left behind",
            "it is completed or taken back; any command that changes something does that first",
            checkpoint=seen.intent.names[0] if seen.intent.names else None,
            action=Settle(),
        )
    if seen.job:
        yield Finding(
            "leftover-job",
            "a job of an interrupted operation, to read dirty bitmaps from, is still running",
            "it is ended",
            action=EndJob(),
        )
    if seen.leftovers:
        yield Finding(
            "leftover-files",
            f"files of an interrupted operation are left: {', '.join(seen.leftovers)}",
            "they are removed",
            action=ClearWorkspace(),
        )


def damaged(seen: Observation) -> Iterator[Finding]:
    """Files of the store that cannot be used."""
    for damage in seen.damaged:
        name = damage.path.stem if damage.path.suffix == ".xml" else None
        lost = f"checkpoint {name} cannot be used, and what changed up to it is not known"
        if damage.path.name == RECORD:
            current = seen.history.current
            lost = f"{'no checkpoint' if current is None else current} is taken for the current one"
        elif damage.path.name == INTENT:
            lost = "what it was about is not known, and nothing can be changed until it is gone"
        yield Finding(
            "unreadable-file",
            f"{damage.message}; {lost}",
            "put the file back from a copy, or else it is moved aside, to a name that ends in "
            ".damaged",
            checkpoint=name,
            action=SetAside(str(damage.path)),
        )


def intervals(seen: Observation) -> Iterator[Finding]:
    """Parents and dirty maps that are lost."""
    for name in seen.history.topological():
        checkpoint = seen.history.get(name)
        lost = checkpoint.parent
        if lost is not None and lost not in {*seen.history.checkpoints, *seen.damaged_names}:
            yield Finding(
                "lost-parent",
                f"checkpoint {name} was made after {lost}, which is not in the store any more",
                f"none is needed: {name} counts as a root, and the differences that its dirty "
                "maps tell stay known",
                checkpoint=name,
                harmless=True,
            )
        for disk in checkpoint.disks:
            interval = disk.interval
            if interval is None or interval.map is None or interval.map not in seen.maps:
                continue
            yield Finding(
                "damaged-map",
                f"{seen.maps[interval.map]}: what changed on {disk.name} from {interval.since} "
                f"to {name} is not known any more",
                "put the file back from a copy, or else that is recorded",
                disk=disk.name,
                checkpoint=name,
                action=MarkUnknown(name, disk.name, "its dirty map was lost or damaged"),
            )


def current_lost(seen: Observation) -> Iterator[Finding]:
    """A record of the current checkpoint that is lost."""
    if any(damage.path.name == RECORD for damage in seen.damaged):
        return  # said already
    current, recorded = seen.history.current, seen.record.current
    if seen.record.name == "":
        if not seen.history.checkpoints:
            return
        lost = "the store does not say which checkpoint is current"
    elif recorded != current:
        lost = f"the current checkpoint, {recorded}, cannot be used"
    else:
        return
    yield Finding(
        "current-lost",
        f"{lost}; {current or 'none'} is taken for the current one",
        "that is recorded",
        checkpoint=current,
        action=SetCurrent(current),
    )
