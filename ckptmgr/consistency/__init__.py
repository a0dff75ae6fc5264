"""check: the store against libvirt, the images, the running QEMU and the marker.  Pure.

`examine` turns what was observed into findings; each names the mismatch, what it means and its
cure, and carries the action that cures it, as data for ``repair``.
"""

from __future__ import annotations

from .bitmaps import other_bitmaps, recorded_bitmaps
from .current import departure, marking
from .disks import domain
from .findings import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Finding,
    Forget,
    GoBack,
    MarkArchived,
    MarkBroken,
    MarkUnknown,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
    Unfinished,
    consistent,
)
from .listed import listed
from .observed import Known, Observation
from .stored import current_lost, damaged, interrupted, intervals

__all__ = [
    "Action",
    "Adopt",
    "ClearWorkspace",
    "EndJob",
    "Finding",
    "Forget",
    "GoBack",
    "Known",
    "MarkArchived",
    "MarkBroken",
    "MarkUnknown",
    "Observation",
    "Redefine",
    "RemoveBitmap",
    "SetAside",
    "SetCurrent",
    "Settle",
    "Unfinished",
    "consistent",
    "examine",
]


def examine(seen: Observation) -> tuple[Finding, ...]:
    """All findings, in the order in which repair cures them."""
    back = departure(seen)
    current = seen.history.current if back is None else back.checkpoint
    # Of a domain that went back without its bitmaps, all else follows when that is recorded.
    reverted = back is not None and back.code == "reverted"
    return (
        *interrupted(seen),
        *damaged(seen),
        *intervals(seen),
        *current_lost(seen),
        *(() if back is None else (back,)),
        *domain(seen),
        *(() if reverted else recorded_bitmaps(seen, current)),
        *other_bitmaps(seen),
        *(() if reverted else listed(seen)),
        *(marking(seen) if back is None else ()),
    )
