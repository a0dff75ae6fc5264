"""What is told of a repository: plain objects and, of each, the JSON promised to scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..views import DomainView, timestamp
from .manifest import Manifest


@dataclass(frozen=True)
class PointDiskView:
    """One disk of a restore point.

    mode -- full or incremental
    file -- the path of its image, which can be opened as it is, and must not be written
    bytes -- what the image takes, without those that it stands on
    """

    name: str
    mode: str
    file: str
    bytes: int
    virtual_size: int
    base: str | None = None
    reason: str | None = None

    def json(self) -> dict[str, Any]:
        """The entry of ``"disks"``."""
        return {
            "name": self.name,
            "mode": self.mode,
            "file": self.file,
            "bytes": self.bytes,
            "virtual_size": self.virtual_size,
            "base": self.base,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class PointView:
    """A restore point with its place in the tree.

    lineage -- the UUID of the domain with which the tree began
    domain, uuid -- of the domain whose state it is
    checkpoint -- the checkpoint of that state
    broken -- why it cannot be restored, as far as the manifests tell; None: nothing speaks
              against it
    """

    lineage: str
    domain: str
    uuid: str
    name: str
    parent: str | None
    checkpoint: str | None
    created: int
    disks: tuple[PointDiskView, ...]
    broken: str | None = None

    @property
    def bytes(self) -> int:
        """What its images take, without those that they stand on."""
        return sum(disk.bytes for disk in self.disks)

    def json(self) -> dict[str, Any]:
        """The entry of ``"points"``."""
        return {
            "domain": self.domain,
            "uuid": self.uuid,
            "lineage": self.lineage,
            "name": self.name,
            "parent": self.parent,
            "checkpoint": self.checkpoint,
            "created": timestamp(self.created),
            "broken": self.broken,
            "disks": [disk.json() for disk in self.disks],
        }


@dataclass(frozen=True)
class DamageView:
    """A point whose manifest cannot be used."""

    lineage: str
    point: str | None
    message: str

    def json(self) -> dict[str, Any]:
        """The entry of ``"damaged"``."""
        return {"lineage": self.lineage, "name": self.point, "message": self.message}


@dataclass(frozen=True)
class PointsView:
    """The points of a repository, or of one domain: by lineage, parents before their children."""

    points: tuple[PointView, ...]
    damaged: tuple[DamageView, ...] = ()

    def json(self) -> dict[str, Any]:
        """The document of points."""
        return {
            "points": [point.json() for point in self.points],
            "damaged": [damage.json() for damage in self.damaged],
        }


@dataclass(frozen=True)
class PrunedPoint:
    """A point that a prune decided on.

    reasons -- why it stays; none: it goes
    merges -- its disks that take over what points that go hold
    """

    lineage: str
    domain: str
    uuid: str
    name: str
    created: int
    bytes: int
    reasons: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()

    @property
    def stays(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)

    def json(self) -> dict[str, Any]:
        """The entry of ``"points"``."""
        return {
            "domain": self.domain,
            "uuid": self.uuid,
            "lineage": self.lineage,
            "name": self.name,
            "created": timestamp(self.created),
            "bytes": self.bytes,
            "stays": self.stays,
            "reasons": list(self.reasons),
            "merges": list(self.merges),
        }


@dataclass(frozen=True)
class PruneView:
    """What a prune decided, the oldest point first; and whether it was done.

    damaged -- manifests that cannot be used; their points stay
    """

    dry_run: bool
    points: tuple[PrunedPoint, ...]
    damaged: tuple[DamageView, ...] = ()

    def json(self) -> dict[str, Any]:
        """The document of prune."""
        return {
            "dry_run": self.dry_run,
            "points": [point.json() for point in self.points],
            "damaged": [damage.json() for damage in self.damaged],
        }


@dataclass(frozen=True)
class VerifyFinding:
    """One thing that is wrong in a repository.

    code -- what it is: damaged-manifest, damaged-data, missing-point, ...
    domain -- name of the domain that the point is of, where that is known
    point -- the point that is damaged, or that should be there
    disk -- the disk that is concerned; None: no one in particular
    message -- says which file or point it is, and what is wrong with it
    affected -- the points that cannot be trusted therefore
    harmless -- nothing is lost by it
    """

    code: str
    lineage: str
    domain: str | None
    point: str | None
    disk: str | None
    message: str
    affected: tuple[str, ...]
    harmless: bool

    def json(self) -> dict[str, Any]:
        """The entry of ``"findings"``."""
        return {
            "code": self.code,
            "lineage": self.lineage,
            "domain": self.domain,
            "point": self.point,
            "disk": self.disk,
            "message": self.message,
            "affected": list(self.affected),
            "harmless": self.harmless,
        }


@dataclass(frozen=True)
class VerifyView:
    """What a verification found.

    points -- how many points were looked at
    """

    points: int
    findings: tuple[VerifyFinding, ...]

    @property
    def sound(self) -> bool:
        """Whether all of them can be restored as they were."""
        return all(finding.harmless for finding in self.findings)

    def json(self) -> dict[str, Any]:
        """The document of verify."""
        return {
            "sound": self.sound,
            "points": self.points,
            "findings": [finding.json() for finding in self.findings],
        }


def point_view(
    lineage: str, folder: str, point: Manifest, *, parent: str | None, broken: str | None
) -> PointView:
    """The view of a point in `folder`, whose parent in the tree is `parent`."""
    return PointView(
        lineage=lineage,
        domain=point.domain_name,
        uuid=point.domain_uuid,
        name=point.name,
        parent=parent,
        checkpoint=point.checkpoint,
        created=point.created,
        disks=tuple(
            PointDiskView(
                name=disk.name,
                mode=disk.mode,
                file=f"{folder}/{disk.file}",
                bytes=disk.bytes,
                virtual_size=disk.virtual_size,
                base=disk.base,
                reason=disk.reason,
            )
            for disk in point.disks
        ),
        broken=broken,
    )


@dataclass(frozen=True)
class RestoredDisk:
    """A disk that was restored.

    file -- where it is now
    bytes -- of data that were written there; what is zero costs nothing
    """

    name: str
    file: str
    format: str
    bytes: int
    virtual_size: int

    def json(self) -> dict[str, Any]:
        """The entry of ``"disks"``."""
        return {
            "name": self.name,
            "file": self.file,
            "format": self.format,
            "bytes": self.bytes,
            "virtual_size": self.virtual_size,
        }


@dataclass(frozen=True)
class RestoreView:
    """What was restored.

    domain -- the domain that was defined, or whose disks they are; None: none
    """

    point: str
    domain: DomainView | None
    disks: tuple[RestoredDisk, ...]

    def json(self) -> dict[str, Any]:
        """The document of restore."""
        return {
            "point": self.point,
            "domain": None if self.domain is None else self.domain.json(),
            "disks": [disk.json() for disk in self.disks],
        }
