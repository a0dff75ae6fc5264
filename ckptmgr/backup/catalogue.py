"""The library's face of a repository: its points, and what can be done with them.

    repository = ckptmgr.repository("/srv/backup")
    for point in repository.points("web").points:
        print(point.name, point.created, point.bytes)

None of it needs libvirt.  Everything raises a subclass of ``ckptmgr.CkptmgrError``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Driver, read_settings, settings_file
from ..errors import InvalidRequest, NoPoint
from .placement import Request
from .pruning import Pruning, prune, staying
from .repository import Lineage, Loaded, Repository
from .retention import NEWEST, Retention
from .views import (
    DamageView,
    PointsView,
    PointView,
    PrunedPoint,
    PruneView,
    RestoreView,
    VerifyFinding,
    VerifyView,
    point_view,
)

if TYPE_CHECKING:
    from ..plan.steps import Plan
    from .staging import Progress

log = logging.getLogger("ckptmgr")


def repository(path: str | Path, *, lock_timeout: float | None = None) -> Catalogue:
    """The repository in the folder `path`.

    lock_timeout -- seconds to wait for another process that changes the same points; default: that
                    of the settings of the driver that the user has, root the system's

    Raises RepositoryFailed if there is none, InvalidRequest for settings that cannot be read.
    """
    found = Repository(Path(path))
    found.require()
    if lock_timeout is None:
        driver = Driver.SYSTEM if os.geteuid() == 0 else Driver.SESSION
        lock_timeout = read_settings(settings_file(driver, None)).lock_timeout
    return Catalogue(found, lock_timeout)


class Catalogue:
    """A repository; made by `ckptmgr.repository`.

    `domain` is everywhere the name or UUID of a domain that the points are of; None: all.
    """

    def __init__(self, repository: Repository, lock_timeout: float) -> None:
        self._repository = repository
        self._lock_timeout = lock_timeout

    @property
    def path(self) -> Path:
        """The folder of the repository."""
        return self._repository.path

    def points(self, domain: str | None = None) -> PointsView:
        """The points, by lineage, parents before their children.

        Raises NoPoint if there is none of `domain`, RepositoryFailed.
        """
        found = self._loaded(domain)
        points: list[PointView] = []
        damaged: list[DamageView] = []
        for lineage, loaded in found:
            wanted = set(loaded.points.manifests if domain is None else loaded.points.of(domain))
            for name in loaded.points.topological():
                if name in wanted:
                    points.append(
                        point_view(
                            lineage.key,
                            str(lineage.path / name),
                            loaded.points.get(name),
                            parent=loaded.points.parent(name),
                            broken=loaded.points.broken(name),
                        )
                    )
            damaged += _damage_views(lineage, loaded)
        return PointsView(tuple(points), tuple(damaged))

    def restore(
        self,
        domain: str,
        point: str,
        folder: str | Path | None = None,
        *,
        disks: Sequence[str] = (),
        onto: Mapping[str, str | Path] | None = None,
        flatten: bool = False,
        progress: Progress = lambda disk, done, of: None,
    ) -> RestoreView:
        """Restore the disks of a point into a folder or onto volumes, or some to each.

        disks -- targets; default: all of the point, or without a folder those of `onto`
        onto -- targets, and the raw file, block device or qcow2 file that each is written to;
                what they held is gone
        flatten -- images that stand by themselves; default: overlays on the images of the point,
                   which is then kept as long as they are there
        progress -- called with ``(disk, bytes done, bytes in all)``

        Every block that is read is compared with its digest.  To define a domain with the disks,
        see Host.restore; to put the disks of a domain back, Domain.restore.

        Raises NoPoint, RepositoryDamaged, RestoreFailed, InvalidRequest, Busy.
        """
        from . import restoring  # libnbd, which few commands need

        kept = restoring.find(self._repository, domain, point)
        wanted = request(point, folder, disks, onto, flatten)
        return restoring.restore(kept, wanted, self._lock_timeout, progress)

    def plan_restore(
        self,
        domain: str,
        point: str,
        folder: str | Path | None = None,
        *,
        disks: Sequence[str] = (),
        onto: Mapping[str, str | Path] | None = None,
        flatten: bool = False,
    ) -> Plan:
        """What restore() would do."""
        from . import restoring  # libnbd, which few commands need

        kept = restoring.find(self._repository, domain, point)
        return restoring.plan_restore(kept, request(point, folder, disks, onto, flatten))

    def verify(self, domain: str | None = None, point: str | None = None) -> VerifyView:
        """Read everything and compare it with its digests.  Changes nothing, takes no lock.

        point -- only this one of `domain`, and what it stands on

        Raises NoPoint, RepositoryFailed, and Unsupported where QEMU's tools are not installed.
        What is damaged is no error: it is in the view.
        """
        from .verification import verify

        if point is not None and domain is None:
            raise InvalidRequest("a point is named together with its domain")
        counted = 0
        findings: list[VerifyFinding] = []
        chosen = self._loaded(domain)
        if point is not None:
            chosen = [(lineage, loaded) for lineage, loaded in chosen if _has(loaded, point)]
            if not chosen:
                raise NoPoint(
                    f"domain {domain!r} has no restore point {point!r} in {self.path}",
                    hint="`ckptmgr points` lists them",
                )
        for lineage, loaded in chosen:
            wanted: tuple[str, ...] | None = None
            if point is not None:
                wanted = (point,)
            elif domain is not None:
                # What cannot be read may be that domain's.
                lost = (each.point for each in loaded.damaged if each.point is not None)
                wanted = (*loaded.points.of(domain), *lost)
            count, found = verify(lineage, wanted)
            counted += count
            findings += found
        return VerifyView(counted, tuple(findings))

    def plan_prune(self, retention: Retention, domain: str | None = None) -> PruneView:
        """What `prune` would do.  Changes nothing; raises as that."""
        decided = [
            self._decide(lineage, loaded, retention, domain)[1]
            for lineage, loaded in self._loaded(domain)
        ]
        return _together(decided, dry_run=True)

    def prune(self, retention: Retention, domain: str | None = None) -> PruneView:
        """Let the points go that `retention` does not keep; those that stay take over their data.

        Points of which a restored overlay still needs an image stay, and so do broken ones.
        Interrupted, it leaves every point that is there whole, and the next one goes on.

        Raises NoPoint, Busy, RepositoryFailed, and RepositoryDamaged where data that is to be taken
        over is not what its digests say: then nothing of that is lost or handed on.
        """
        from .compaction import carry_out  # libnbd, which few commands need

        decided = []
        for lineage, _ in self._loaded(domain):
            with lineage.lock(self._lock_timeout):
                lineage.settle()
                loaded = lineage.load()
                pruning, view = self._decide(lineage, loaded, retention, domain)
                carry_out(lineage, loaded.points, pruning)
            _warn(view, retention)
            decided.append(view)
        return _together(decided, dry_run=False)

    def _decide(
        self, lineage: Lineage, loaded: Loaded, retention: Retention, domain: str | None
    ) -> tuple[Pruning, PruneView]:
        """What is to be done in one lineage, and what is told of it."""
        from .compaction import held_back

        points = loaded.points
        chosen = set(points.manifests if domain is None else points.of(domain))
        reasons = staying(points, domain, retention)
        for name, others in held_back(lineage, loaded).items():
            if name in chosen:
                reasons[name] = (*reasons.get(name, ()), *others)
        pruning = prune(points, chosen - reasons.keys())
        merges = {
            rewrite.manifest.name: tuple(merging.disk for merging in rewrite.merges)
            for rewrite in pruning.rewrites
        }
        told = tuple(
            PrunedPoint(
                lineage=lineage.key,
                domain=point.domain_name,
                uuid=point.domain_uuid,
                name=point.name,
                created=point.created,
                bytes=sum(disk.bytes for disk in point.disks),
                reasons=reasons.get(point.name, ()),
                merges=merges.get(point.name, ()),
            )
            for point in (points.get(name) for name in points.by_time() if name in chosen)
        )
        return pruning, PruneView(True, told, _damage_views(lineage, loaded))

    def _loaded(self, domain: str | None) -> list[tuple[Lineage, Loaded]]:
        """The lineages in question."""
        found = [(each, each.load()) for each in self._repository.lineages()]
        if domain is None:
            return found
        chosen = [
            (lineage, loaded)
            for lineage, loaded in found
            if loaded.points.of(domain) or (lineage.key == domain and loaded.damaged)
        ]
        if not chosen:
            raise NoPoint(
                f"the repository {self.path} has no restore point of domain {domain!r}",
                hint=f"ckptmgr points {self.path}",
            )
        return chosen


def request(
    point: str,
    folder: str | Path | None,
    disks: Sequence[str],
    onto: Mapping[str, str | Path] | None,
    flatten: bool,
) -> Request:
    """The request, from what a caller may give."""
    volumes = {disk: Path(path) for disk, path in (onto or {}).items()}
    place = None if folder is None else Path(folder)
    return Request(point, place, tuple(disks), volumes, flatten)


def _has(loaded: Loaded, point: str) -> bool:
    return point in loaded.points or any(damage.point == point for damage in loaded.damaged)


def _damage_views(lineage: Lineage, loaded: Loaded) -> tuple[DamageView, ...]:
    return tuple(DamageView(lineage.key, each.point, each.message) for each in loaded.damaged)


def _warn(view: PruneView, retention: Retention) -> None:
    """Say which points stay for another reason than their time."""
    for damage in view.damaged:
        log.warning("%s", damage.message)
    for point in view.points:
        special = [
            each
            for each in point.reasons
            if each not in retention.rules() and not each.startswith(NEWEST)
        ]
        if special:
            log.warning("restore point %s stays: %s", point.name, "; ".join(special))


def _together(views: list[PruneView], *, dry_run: bool) -> PruneView:
    return PruneView(
        dry_run,
        tuple(point for view in views for point in view.points),
        tuple(damage for view in views for damage in view.damaged),
    )
