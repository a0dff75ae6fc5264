"""The points of one lineage: their tree, and for each disk the chain of images under a point.

Pure data.  Relations are by name and confirmed by id: a point that was replaced by another of the
same name is not the one that others stand on.  Order comes from what is recorded, never from file
times.  What is recorded may be damaged in part; every walk ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from ..errors import NoPoint, RepositoryDamaged
from ..tree import Tree, tree
from .manifest import Manifest, PointDisk


@dataclass(frozen=True)
class Points:
    """The manifests of a lineage by name."""

    manifests: Mapping[str, Manifest]

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifests", MappingProxyType(dict(self.manifests)))

    def __contains__(self, name: str) -> bool:
        return name in self.manifests

    def __len__(self) -> int:
        return len(self.manifests)

    def get(self, name: str) -> Manifest:
        """The point called `name`.  Raises NoPoint."""
        try:
            return self.manifests[name]
        except KeyError:
            raise NoPoint(f"there is no restore point {name}") from None

    def only(self, names: Iterable[str]) -> Points:
        """Those among `names`."""
        wanted = set(names)
        return Points({name: each for name, each in self.manifests.items() if name in wanted})

    # --- the tree ----------------------------------------------------------------------------

    def parent(self, name: str) -> str | None:
        """The parent of `name` if it is there; None for a root."""
        self.get(name)
        return self._tree.parents[name]

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The parent of `name`, its parent, and so on up to a root."""
        self.get(name)
        return self._tree.ancestors(name)

    def children(self, name: str) -> tuple[str, ...]:
        """The points made after `name`, by time."""
        self.get(name)
        return self._tree.children[name]

    def roots(self) -> tuple[str, ...]:
        """The points whose parent is none or is not there, by time."""
        return self._tree.children[None]

    def leaves(self) -> tuple[str, ...]:
        """The points without children, in topological order."""
        return self._tree.leaves

    def topological(self) -> tuple[str, ...]:
        """All of them depth first, parents before children, siblings by time."""
        return self._tree.order

    def by_time(self) -> tuple[str, ...]:
        """All of them, oldest first; none before its parent."""
        return tuple(self.times)

    @cached_property
    def times(self) -> dict[str, int]:
        """When each was made, oldest first; see Tree.times."""
        return self._tree.times(lambda name: self.manifests[name].created)

    def newest(self, domain: str | None = None) -> str | None:
        """The point that was made last; of the domain with that name or UUID only."""
        names = self.by_time() if domain is None else self.of(domain)
        return names[-1] if names else None

    def newer(self, made: Manifest) -> str | None:
        """The point of the same domain that counts as newer than `made`, which is made just now."""
        found = Points({**self.manifests, made.name: made})
        newest = found.newest(made.domain_uuid)
        if newest is None or found.times[newest] == found.times[made.name]:
            return None
        return newest

    def of(self, domain: str) -> tuple[str, ...]:
        """The points of the domain with that name or UUID, oldest first."""
        return tuple(
            name
            for name in self.by_time()
            if domain in (self.get(name).domain_name, self.get(name).domain_uuid)
        )

    # --- chains ------------------------------------------------------------------------------

    def disk(self, point: str, disk: str) -> PointDisk:
        """A disk of a point.  Raises NoPoint, also if the point has no such disk."""
        found = self.get(point).disk(disk)
        if found is None:
            raise NoPoint(f"restore point {point} has no disk {disk}")
        return found

    def chain(self, point: str, disk: str) -> tuple[str, ...]:
        """The points whose images make up `disk` of `point`, the point itself first.

        Raises NoPoint, and RepositoryDamaged where the chain is not complete.
        """
        self.disk(point, disk)
        found, broken = self._walk(point, disk)
        if broken is not None:
            raise RepositoryDamaged(broken, hint="`ckptmgr verify` names all that is affected")
        return found

    def reached(self, point: str, disk: str) -> tuple[str, ...]:
        """As `chain`, as far as that goes.  Raises NoPoint."""
        self.disk(point, disk)
        return self._walk(point, disk)[0]

    def broken(self, point: str) -> str | None:
        """Why a disk of `point` cannot be put together; None if all can.  Raises NoPoint."""
        reasons = (self._walk(point, disk.name)[1] for disk in self.get(point).disks)
        return next((reason for reason in reasons if reason is not None), None)

    def standing(self, point: str, disk: str) -> tuple[str, ...]:
        """The points whose image of `disk` has that of `point` as its backing file, by time."""
        there = self.manifests.get(point)
        return tuple(
            name
            for name in self._naming.get((point, disk), ())
            if there is not None and self.disk(name, disk).base_id == there.id
        )

    def dependants(self, point: str, disk: str | None = None) -> tuple[str, ...]:
        """All points that name `point` as what they stand on, or stand on one that does; by time.

        disk -- with this disk; None: with any

        `point` itself need not be there, nor be the one that they were made on.
        """
        found: set[str] = set()
        for each in {name for _, name in self._naming} if disk is None else {disk}:
            reached: set[str] = set()
            waiting = [point]
            while waiting:
                above = set(self._naming.get((waiting.pop(), each), ())) - reached
                reached |= above
                waiting.extend(above)
            found |= reached
        return tuple(name for name in self.by_time() if name in found and name != point)

    # --- how ---------------------------------------------------------------------------------

    def _walk(self, point: str, disk: str) -> tuple[tuple[str, ...], str | None]:
        """The chain as far as it goes, and why it does not go on."""
        found: dict[str, None] = {}
        while True:
            found[point] = None
            recorded = self.disk(point, disk)
            if recorded.base is None:
                return tuple(found), None
            base = self.manifests.get(recorded.base)
            where = f"disk {disk} of restore point {point} stands on {recorded.base}, which"
            if base is None:
                return tuple(found), f"{where} is missing or damaged"
            if base.id != recorded.base_id:
                return tuple(found), f"{where} is another point of that name"
            if base.disk(disk) is None:
                return tuple(found), f"{where} has no such disk"
            if recorded.base in found:
                return tuple(found), f"{where} stands on it"
            point = recorded.base

    @cached_property
    def _naming(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """By point and disk, the points that name it as the base of that disk, by time."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in self.by_time():
            for disk in self.get(name).disks:
                if disk.base is not None:
                    found.setdefault((disk.base, disk.name), []).append(name)
        return {key: tuple(names) for key, names in found.items()}

    @cached_property
    def _tree(self) -> Tree:
        return tree(
            {name: self._parent(each) for name, each in self.manifests.items()},
            lambda name: self.manifests[name].created,
        )

    def _parent(self, manifest: Manifest) -> str | None:
        """The parent that is recorded, if that is the point of this name."""
        there = None if manifest.parent is None else self.manifests.get(manifest.parent)
        return None if there is None or there.id != manifest.parent_id else manifest.parent
