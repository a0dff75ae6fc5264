"""libvirt's list of checkpoints against the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoint import shown_disks
from ..history import History
from ..plan.libvirt import DISCARD
from .findings import Adopt, Finding, Forget, Redefine
from .observed import Known, Observation


def listed(seen: Observation) -> Iterator[Finding]:
    """Every checkpoint that libvirt has or should have."""
    if not seen.told:
        return
    known = {checkpoint.name: checkpoint for checkpoint in seen.known}
    for name, given in known.items():
        if name not in seen.history.checkpoints and name not in seen.damaged_names:
            yield _libvirt_only(given)
    for name in seen.history.topological():
        shown = shown_disks(seen.history.get(name))
        if name in known:
            yield from _shown(seen, known, name, shown)
        elif shown:
            yield Finding(
                "store-only",
                f"libvirt does not know checkpoint {name}",
                "libvirt is shown it again",
                checkpoint=name,
                action=Redefine(name),
            )


def _libvirt_only(given: Known) -> Finding:
    if given.name == DISCARD:
        return Finding(
            "leftover-checkpoint",
            f"libvirt has a checkpoint {DISCARD}, which an interrupted operation left behind",
            "libvirt's metadata of it is deleted",
            action=Forget(DISCARD),
        )
    message = f"libvirt has a checkpoint {given.name} that ckptmgr did not make"
    if given.refused is not None:
        return Finding(
            "libvirt-only",
            f"{message} and cannot take over: {given.refused}",
            f"delete it with virsh checkpoint-delete, if nobody needs it: {given.name}",
            checkpoint=given.name,
        )
    return Finding(
        "libvirt-only",
        message,
        "it is taken over, as by `ckptmgr adopt`",
        checkpoint=given.name,
        action=Adopt(),
    )


def _shown(
    seen: Observation, known: Mapping[str, Known], name: str, shown: frozenset[str]
) -> Iterator[Finding]:
    present = {disk.target for disk in seen.disks}
    if not shown:
        if _stale(seen.history, known, name):
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
    found = _listed_parent(seen.history, known, name)
    if wanted != found:
        yield Finding(
            "wrong-parent",
            f"libvirt has {found or 'no checkpoint'} for the parent of {name}, and it should be "
            f"{wanted or 'none'}",
            "libvirt is shown it anew",
            checkpoint=name,
            action=Redefine(name),
        )


def _stale(history: History, known: Mapping[str, Known], name: str) -> bool:
    """Whether libvirt lists a checkpoint that has lost its bitmaps, and is to list it no more."""
    checkpoint = history.get(name)
    had_bitmaps = any(disk.bitmap is not None and disk.persistent for disk in checkpoint.disks)
    return not shown_disks(checkpoint) and (had_bitmaps or bool(known[name].disks))


def _shown_parent(history: History, known: Mapping[str, Known], name: str) -> str | None:
    """The nearest ancestor that libvirt lists, and is to list."""
    above = history.parent(name)
    while above is not None and (above not in known or _stale(history, known, above)):
        above = history.parent(above)
    return above


def _listed_parent(history: History, known: Mapping[str, Known], name: str) -> str | None:
    """The nearest ancestor by libvirt's list that is neither a stranger nor to go."""
    passed = {name}
    above = known[name].parent
    while above is not None and (
        above not in history.checkpoints or (above in known and _stale(history, known, above))
    ):
        if above in passed or above not in known:
            return None
        passed.add(above)
        above = known[above].parent
    return above
