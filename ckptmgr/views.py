"""What the use cases return: plain objects and, of each, the JSON promised to scripts.

The shapes are those of ``docs/cli.md``; nothing is ever taken out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .checkpoint import EngineName, State

if TYPE_CHECKING:
    from .dirtymap import DirtyMap


def timestamp(seconds: int) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, ``2026-11-22T09:30:00Z``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class DomainView:
    """Which domain."""

    name: str
    uuid: str

    def json(self) -> dict[str, Any]:
        """``{"name", "uuid"}``."""
        return {"name": self.name, "uuid": self.uuid}


@dataclass(frozen=True)
class DiskView:
    """One disk of a checkpoint.

    dirty_bytes -- written since the checkpoint, in bytes; None if not asked for or unknown
    reason -- why the disk is not tracked, or why its bitmap is broken
    """

    name: str
    bitmap: str | None
    granularity: int | None
    node: str | None
    persistent: bool
    state: State
    reason: str | None = None
    dirty_bytes: int | None = None

    def json(self) -> dict[str, Any]:
        """The entry of ``"disks"``."""
        return {
            "name": self.name,
            "checkpoint": "no" if self.bitmap is None else "bitmap",
            "bitmap": self.bitmap,
            "granularity": self.granularity,
            "node": self.node,
            "persistent": self.persistent,
            "state": self.state.value,
            "reason": self.reason,
            "dirty_bytes": self.dirty_bytes,
        }


@dataclass(frozen=True)
class CheckpointView:
    """One checkpoint with its place in the history."""

    name: str
    domain: DomainView
    parent: str | None
    children: tuple[str, ...]
    current: bool
    created: int
    description: str | None
    engine: EngineName
    disks: tuple[DiskView, ...]

    def json(self) -> dict[str, Any]:
        """The document of create, show, current and parent."""
        return {
            "name": self.name,
            "domain": self.domain.json(),
            "parent": self.parent,
            "children": list(self.children),
            "current": self.current,
            "created": timestamp(self.created),
            "description": self.description,
            "engine": self.engine.value,
            "disks": [disk.json() for disk in self.disks],
        }


@dataclass(frozen=True)
class SnapshotView:
    """A libvirt snapshot and its place in the history.

    checkpoint -- the one that was current when it was taken: the parent of what comes after a
                  revert to it; None: there was none
    memory, disks -- no, internal or external
    """

    name: str
    domain: DomainView
    parent: str | None
    checkpoint: str | None
    created: int
    current: bool
    state: str
    memory: str
    disks: tuple[tuple[str, str], ...]

    def json(self) -> dict[str, Any]:
        """The entry of ``"snapshots"``."""
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "created": timestamp(self.created),
            "current": self.current,
            "parent": self.parent,
            "state": self.state,
            "memory": self.memory,
            "disks": [{"name": name, "kind": kind} for name, kind in self.disks],
        }


@dataclass(frozen=True)
class PlaceView:
    """Where the domain is now.

    checkpoint -- the one that it descends from; the current one, unless it went back behind our
                  back; None: no checkpoint that is known
    state -- running, paused, shut off, ...
    """

    checkpoint: str | None
    state: str

    def json(self) -> dict[str, Any]:
        """``"now"`` of list --tree."""
        return {"checkpoint": self.checkpoint, "state": self.state}


@dataclass(frozen=True)
class ListView:
    """Checkpoints of a domain, in the order asked for.

    snapshots, place -- the domain's snapshots and where it is now; None: not asked for
    """

    domain: DomainView
    current: str | None
    checkpoints: tuple[CheckpointView, ...]
    snapshots: tuple[SnapshotView, ...] | None = None
    place: PlaceView | None = None

    def json(self) -> dict[str, Any]:
        """The document of list."""
        document: dict[str, Any] = {
            "domain": self.domain.json(),
            "current": self.current,
            "checkpoints": [checkpoint.json() for checkpoint in self.checkpoints],
        }
        if self.snapshots is not None:
            document["snapshots"] = [snapshot.json() for snapshot in self.snapshots]
        if self.place is not None:
            document["now"] = self.place.json()
        return document


@dataclass(frozen=True)
class DiskDiff:
    """What changed on one disk.

    size -- virtual size of the disk in bytes
    map -- the granules that changed; None: unknown, so everything may have
    reason -- why it is unknown
    """

    name: str
    size: int
    granularity: int | None
    map: DirtyMap | None
    reason: str | None = None

    @property
    def known(self) -> bool:
        """Whether the map is exact."""
        return self.map is not None

    @property
    def dirty_bytes(self) -> int:
        """Bytes that changed; all of the disk where that is unknown."""
        return self.size if self.map is None else self.map.dirty_bytes

    def extents(self) -> list[tuple[int, int]]:
        """``(start, length)`` in bytes, ascending, not touching; all of the disk if unknown."""
        if self.map is None:
            return [(0, self.size)] if self.size else []
        return list(self.map.extents())

    def json(self, *, extents: bool = False) -> dict[str, Any]:
        """The entry of ``"disks"``."""
        document: dict[str, Any] = {
            "name": self.name,
            "granularity": self.granularity,
            "known": self.known,
            "reason": self.reason,
            "dirty_bytes": self.dirty_bytes,
        }
        if extents:
            document["extents"] = [list(extent) for extent in self.extents()]
        return document


@dataclass(frozen=True)
class DiffView:
    """What changed between two checkpoints, or since one (`end` is None)."""

    domain: DomainView
    start: str
    end: str | None
    disks: tuple[DiskDiff, ...]

    def json(self, *, extents: bool = False) -> dict[str, Any]:
        """The document of diff."""
        return {
            "from": self.start,
            "to": self.end,
            "disks": [disk.json(extents=extents) for disk in self.disks],
        }
