"""The tree of one domain's checkpoints, and for each disk the line of intervals through it.

Pure data: a change gives a new history.  Relations are by name.  What is recorded may be
damaged in part (a file lost, two files that name each other as parent): every walk ends, and a
checkpoint whose parent is not there counts as a root but keeps its parent's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from .checkpoint import Checkpoint, Interval
from .errors import CheckpointExists, NoCheckpoint
from .tree import Tree, tree


@dataclass(frozen=True)
class Path:
    """The intervals of one disk between two checkpoints.

    intervals -- each with the checkpoint that ends it: from the start up to the nearest
                 checkpoint that both lines have in common, then down to the end
    broken -- why the union of their maps does not say what changed, or None if it does
    """

    intervals: tuple[tuple[str, Interval], ...] = ()
    broken: str | None = None


@dataclass(frozen=True)
class Join:
    """Maps of which a checkpoint's disk gets the union as its interval's map."""

    checkpoint: str
    disk: str
    maps: tuple[str, ...]


@dataclass(frozen=True)
class Deletion:
    """What becomes of a history when checkpoints are deleted.

    removed -- names, children before their parents
    changed -- surviving checkpoints as they are to be recorded; intervals with a join to come
               are unknown in them, so that nothing is lost when it cannot be made
    joins -- the unions to compute; `settled` puts their digests into `changed`
    current -- the current checkpoint afterwards
    history -- all of it afterwards, with `changed`
    """

    removed: tuple[str, ...]
    changed: tuple[Checkpoint, ...]
    joins: tuple[Join, ...]
    current: str | None
    history: History

    def settled(self, maps: Mapping[Join, str]) -> tuple[Checkpoint, ...]:
        """`changed` with the digests of the joined maps.

        A join that is left out leaves its interval unknown.
        """
        digests = {(join.checkpoint, join.disk): digest for join, digest in maps.items()}
        return tuple(_with_maps(checkpoint, digests) for checkpoint in self.changed)


@dataclass(frozen=True)
class History:
    """The checkpoints of a domain by name, and which of them is current.

    Raises ValueError if the current one is not among them.
    """

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    current: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", MappingProxyType(dict(self.checkpoints)))
        if self.current is not None and self.current not in self.checkpoints:
            raise ValueError(f"the current checkpoint {self.current} is not in the history")

    # --- relations ---------------------------------------------------------------------------

    @property
    def has_current(self) -> bool:
        """Whether there is a current checkpoint."""
        return self.current is not None

    def get(self, name: str) -> Checkpoint:
        """The checkpoint called `name`.  Raises NoCheckpoint."""
        try:
            return self.checkpoints[name]
        except KeyError:
            raise NoCheckpoint(
                f"there is no checkpoint {name!r}", hint="`ckptmgr list` lists them"
            ) from None

    def parent(self, name: str) -> str | None:
        """The parent of `name`, if it is there; None for a root."""
        self.get(name)
        return self._tree.parents[name]

    def children(self, name: str) -> tuple[str, ...]:
        """The checkpoints made after `name`, by time of creation."""
        self.get(name)
        return self._tree.children[name]

    def roots(self) -> tuple[str, ...]:
        """The checkpoints without a parent, or whose parent is not there, by time of creation."""
        return self._tree.children[None]

    def leaves(self) -> tuple[str, ...]:
        """The checkpoints without children, in topological order."""
        return self._tree.leaves

    def newest(self) -> str | None:
        """The leaf that was made last; None where there is no checkpoint.  See Tree.times."""
        return next(reversed(self.times), None)

    @cached_property
    def times(self) -> dict[str, int]:
        """When each was made, the oldest first; see Tree.times."""
        return self._tree.times(lambda name: self.checkpoints[name].created)

    def topological(self) -> tuple[str, ...]:
        """All of them depth first, parents before children, siblings by time of creation."""
        return self._tree.order

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The parent of `name`, its parent, and so on up to a root."""
        self.get(name)
        return self._tree.ancestors(name)

    def descendants(self, name: str) -> tuple[str, ...]:
        """All that come after `name`, depth first, parents before children."""
        self.get(name)
        return self._tree.descendants(name)

    @property
    def circular(self) -> tuple[str, ...]:
        """Checkpoints that are their own ancestors as recorded; each of them counts as a root."""
        return tuple(
            name
            for name, checkpoint in self.checkpoints.items()
            if checkpoint.parent in self.checkpoints and self._tree.parents[name] is None
        )

    def add(self, checkpoint: Checkpoint, make_current: bool = True) -> History:
        """The history with one checkpoint more.  Raises CheckpointExists if its name is taken."""
        if checkpoint.name in self.checkpoints:
            raise CheckpointExists(f"there is a checkpoint {checkpoint.name} already")
        current = checkpoint.name if make_current else self.current
        return History({**self.checkpoints, checkpoint.name: checkpoint}, current)

    def replace(self, checkpoint: Checkpoint) -> History:
        """The history with another record of the same checkpoint.  Raises NoCheckpoint."""
        self.get(checkpoint.name)
        return History({**self.checkpoints, checkpoint.name: checkpoint}, self.current)

    # --- intervals ---------------------------------------------------------------------------

    def tracks(self, disk: str, name: str) -> bool:
        """Whether a bitmap of `disk` starts at `name`."""
        recorded = self.get(name).disk(disk)
        return recorded is not None and recorded.bitmap is not None

    def tracker(self, disk: str, name: str) -> str | None:
        """The nearest of `name` and its ancestors that tracks `disk`; where an interval of a
        child of `name` starts.
        """
        line = (name, *self.ancestors(name))
        return next((above for above in line if self.tracks(disk, above)), None)

    def path(self, disk: str, start: str, end: str) -> Path:
        """What lies between two checkpoints for `disk`, on one line of history or across a fork.

        Raises NoCheckpoint.
        """
        for name in (start, end):
            if not self.tracks(disk, name):
                return Path(broken=f"checkpoint {name} does not track {disk}")
        up, top = self._line(disk, start)
        down, bottom = self._line(disk, end)
        # A line's names are those of its checkpoints and where it breaks off: two lines that
        # meet in a checkpoint whose file is lost are still connected.
        below_start = {name: index for index, (name, _) in enumerate(up)}
        below_start.setdefault(top, len(up))
        names = [*(name for name, _ in down), bottom]
        for index, name in enumerate(names):
            if name in below_start:
                intervals = (*up[: below_start[name]], *reversed(down[:index]))
                return Path(intervals, _first_unknown(disk, intervals))
        ends = sorted({top, bottom})
        return Path(
            broken=f"the histories of {disk} that start at {' and '.join(ends)} have no link"
        )

    def deletion(self, names: Iterable[str]) -> Deletion:
        """What deleting `names` does: children move to the nearest surviving ancestor, and the
        intervals that a removed checkpoint starts take in those that it ends.

        Raises NoCheckpoint.
        """
        gone = {self.get(name).name for name in names}
        kept = {name: point for name, point in self.checkpoints.items() if name not in gone}
        joins: list[Join] = []
        changed: dict[str, Checkpoint] = {}
        for name in self._tree.order:
            if name not in gone:
                point = self._without(gone, kept[name], joins)
                if point != kept[name]:
                    changed[name] = point
        current = self.current
        while current in gone:
            current = self._tree.parents[current]
        return Deletion(
            removed=tuple(name for name in reversed(self._tree.order) if name in gone),
            changed=tuple(changed.values()),
            joins=tuple(joins),
            current=current,
            history=History({**kept, **changed}, current),
        )

    # --- how ---------------------------------------------------------------------------------

    @cached_property
    def _tree(self) -> Tree:
        return tree(
            {name: each.parent for name, each in self.checkpoints.items()},
            lambda name: self.checkpoints[name].created,
        )

    def _interval(self, disk: str, name: str) -> Interval | None:
        """The interval of `disk` that `name` ends, if it is there and has one."""
        if name not in self.checkpoints:
            return None
        recorded = self.checkpoints[name].disk(disk)
        return None if recorded is None else recorded.interval

    def _line(self, disk: str, name: str) -> tuple[list[tuple[str, Interval]], str]:
        """The intervals of `disk` from `name` upwards, and the name at which they start."""
        found: dict[str, Interval] = {}
        while name not in found and (interval := self._interval(disk, name)) is not None:
            found[name] = interval
            name = interval.since
        return list(found.items()), name

    def _without(self, gone: set[str], point: Checkpoint, joins: list[Join]) -> Checkpoint:
        """`point` when `gone` are not there any more; appends the joins that its disks need."""
        parent = point.parent
        passed = {point.name}
        while parent in gone and parent not in passed:
            passed.add(parent)
            parent = self.checkpoints[parent].parent
        if parent in passed:  # a cycle, in a damaged history
            parent = None
        disks = []
        for disk in point.disks:
            interval = disk.interval
            if interval is not None and interval.since in gone:
                interval, maps = self._climb(gone, disk.name, interval)
                if maps:
                    joins.append(Join(point.name, disk.name, maps))
            disks.append(replace(disk, interval=interval))
        return replace(point, parent=parent, disks=tuple(disks))

    def _climb(
        self, gone: set[str], disk: str, interval: Interval
    ) -> tuple[Interval | None, tuple[str, ...]]:
        """The interval that starts at the first survivor instead, and the maps it is to join."""
        intervals = [interval]
        seen: set[str] = set()
        while (since := intervals[-1].since) in gone:
            above = self._interval(disk, since)
            if above is None or since in seen:
                return None, ()
            seen.add(since)
            intervals.append(above)
        maps = tuple(dict.fromkeys(part.map for part in intervals if part.map is not None))
        unknown = [part for part in intervals if part.map is None]
        if unknown:
            return Interval(since, None, unknown[0].reason), ()
        if len(maps) == 1:
            return Interval(since, maps[0]), ()
        return Interval(since, None, NOT_JOINED), maps


NOT_JOINED = "the dirty maps of deleted checkpoints could not be joined"
"""Why an interval is unknown whose `Join` was not made."""


def _with_maps(checkpoint: Checkpoint, digests: Mapping[tuple[str, str], str]) -> Checkpoint:
    disks = []
    for disk in checkpoint.disks:
        digest = digests.get((checkpoint.name, disk.name))
        if disk.interval is not None and digest is not None:
            disk = replace(disk, interval=Interval(disk.interval.since, digest))
        disks.append(disk)
    return replace(checkpoint, disks=tuple(disks))


def _first_unknown(disk: str, intervals: Iterable[tuple[str, Interval]]) -> str | None:
    for name, interval in intervals:
        if interval.map is None:
            reason = interval.reason or "its dirty map was not kept"
            return f"what changed on {disk} from {interval.since} to {name} is unknown: {reason}"
    return None
