"""What it takes to let points go without any other losing what it stands on: pure.

A point stays whole by taking over what the points between it and the next one that stays hold:
for each of its disks, the images of those are merged into its own.  Nothing of the points that go
is touched before every other has been rewritten, and then the ones on which nothing stands go
first; so at any moment every point that is there can be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime

from .manifest import FULL, INCREMENTAL, Manifest, PointDisk
from .points import Points
from .retention import NEWEST, Retention, kept, local

MERGED = "what it stood on was pruned"
"""Why a disk is full that once was not."""


BROKEN = "broken"
"""Why a point stays whose images cannot all be put together: nothing is known to replace it."""


def staying(
    points: Points,
    domain: str | None,
    retention: Retention,
    clock: Callable[[int], datetime] = local,
) -> dict[str, tuple[str, ...]]:
    """The points that stay by their times, and why.

    domain -- whose points may go; None: every domain's, each by itself
    """
    reasons: dict[str, tuple[str, ...]] = {}
    domains = {each.domain_uuid for each in points.manifests.values()}
    for uuid in sorted(domains):
        whole = []
        for name in points.of(uuid):
            if points.broken(name) is not None:
                reasons[name] = (BROKEN,)
            else:
                whole.append((name, points.get(name).created))
        reasons |= kept(whole, retention, clock)
        # A point need not have all disks: of each disk, the newest there is stays too.
        newest = {disk.name: name for name, _ in whole for disk in points.get(name).disks}
        for disk, name in newest.items():
            if NEWEST not in reasons.get(name, ()):
                reasons[name] = (*reasons.get(name, ()), f"{NEWEST} of {disk}")
    chosen = set(points.manifests if domain is None else points.of(domain))
    return {name: reasons[name] for name in points.by_time() if name in reasons and name in chosen}


@dataclass(frozen=True)
class Merging:
    """The images of one disk that become one.

    layers -- the points whose images are merged, the one that stays first
    below -- the points on whose images the result stands, top first
    """

    disk: str
    layers: tuple[str, ...]
    below: tuple[str, ...]


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one point that stays.

    manifest -- with its new relations; sizes and digests of merged disks are still the old ones
    merges -- of its disks
    """

    manifest: Manifest
    merges: tuple[Merging, ...]


@dataclass(frozen=True)
class Pruning:
    """All that is to be done, in order.

    rewrites -- of points that stay, those that others stand on first
    goes -- the points to remove then, each when nothing stands on it any more
    """

    rewrites: tuple[Rewrite, ...]
    goes: tuple[str, ...]


def prune(points: Points, goes: Collection[str]) -> Pruning:
    """What letting `goes` go takes.  None of them is broken (see `Points.broken`)."""
    gone = set(goes)
    rewrites = []
    for name in points.by_time():
        if name not in gone and (found := _rewrite(points, name, gone)) is not None:
            rewrites.append(found)
    # Children before their parents, and what stands on another before that one.
    order = [name for name in reversed(points.topological()) if name in gone]
    standing = {name: set(points.dependants(name)) & gone for name in order}
    removals: list[str] = []
    while order:
        name = next((each for each in order if not standing[each] - set(removals)), order[0])
        order.remove(name)
        removals.append(name)
    return Pruning(tuple(rewrites), tuple(removals))


def _rewrite(points: Points, name: str, gone: set[str]) -> Rewrite | None:
    manifest = points.get(name)
    merges = []
    disks = []
    for disk in manifest.disks:
        merging = _merging(points, name, disk.name, gone)
        if merging is not None:
            merges.append(merging)
            disk = _rebased(points, disk, merging)
        disks.append(disk)
    changed = replace(manifest, disks=tuple(disks))
    parent = points.parent(name)
    if parent in gone:
        above = next((each for each in points.ancestors(name) if each not in gone), None)
        identity = None if above is None else points.get(above).id
        changed = replace(changed, parent=above, parent_id=identity)
    return None if changed == manifest else Rewrite(changed, tuple(merges))


def _merging(points: Points, name: str, disk: str, gone: set[str]) -> Merging | None:
    base = points.disk(name, disk).base
    if base not in gone or name not in points.standing(base, disk):
        return None
    chain = points.chain(name, disk)
    end = next((at for at, each in enumerate(chain) if at and each not in gone), len(chain))
    return Merging(disk, chain[:end], chain[end:])


def _rebased(points: Points, disk: PointDisk, merging: Merging) -> PointDisk:
    if not merging.below:
        return replace(disk, mode=FULL, base=None, base_id=None, reason=MERGED)
    base = merging.below[0]
    return replace(disk, mode=INCREMENTAL, base=base, base_id=points.get(base).id)
