"""Restoring a point to a folder or onto volumes; needs no libvirt."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import EngineName
from ..errors import InvalidRequest, NoPoint, RepositoryDamaged, RestoreFailed
from ..views import DomainView
from .manifest import Manifest
from .placement import Found, Request, look, place, remarks
from .points import Points
from .repository import Lineage, Loaded, Repository
from .staging import Progress, Staged, check, install, staged
from .views import RestoredDisk, RestoreView

if TYPE_CHECKING:
    from ..plan.steps import Plan

log = logging.getLogger("ckptmgr")

FOLDER_MODE = 0o711
"""Of a folder that is made: QEMU, which runs as another user, must get through."""


@dataclass(frozen=True)
class Kept:
    """A restore point and where it is."""

    lineage: Lineage
    points: Points
    manifest: Manifest


def find(repository: Repository, domain: str, point: str) -> Kept:
    """The restore point of a domain, by its name or UUID.

    Raises NoPoint, RepositoryDamaged, RepositoryFailed, and InvalidRequest where there is more
    than one.
    """
    loaded = [(lineage, lineage.load()) for lineage in repository.lineages()]
    of_domain = [
        (lineage, each)
        for lineage, each in loaded
        if lineage.key == domain or each.points.of(domain)
    ]
    if not of_domain:
        raise NoPoint(
            f"the repository {repository.path} has no restore point of domain {domain!r}",
            hint=f"ckptmgr points {repository.path}",
        )
    return among(of_domain, domain, point)


def among(candidates: Sequence[tuple[Lineage, Loaded]], domain: str, point: str) -> Kept:
    """The restore point in one of the lineages.  Raises NoPoint, RepositoryDamaged."""
    found = [
        Kept(lineage, each.points, each.points.get(point))
        for lineage, each in candidates
        if point in each.points
    ]
    if len(found) > 1:
        uuids = ", ".join(each.lineage.key for each in found)
        raise InvalidRequest(
            f"there is more than one restore point {point!r} of a domain {domain!r}",
            hint=f"name the domain by its UUID: {uuids}",
        )
    if found:
        return found[0]
    for _, each in candidates:
        for damage in each.damaged:
            if damage.point == point:
                raise RepositoryDamaged(
                    f"restore point {point} of domain {domain!r} is damaged: {damage.message}",
                    hint="`ckptmgr verify` names all that is affected",
                )
    raise NoPoint(
        f"there is no restore point {point!r} of domain {domain!r}",
        hint="`ckptmgr points` lists them",
    )


def restore(kept: Kept, request: Request, lock_timeout: float, progress: Progress) -> RestoreView:
    """Restore disks to where the request says.  See Catalogue.restore."""
    request = settled(request)
    found = volumes(request.onto)
    places = place(kept.manifest, request, found)
    with (
        made(request.folder),
        staged(kept.lineage, kept.manifest, places, lock_timeout, progress=progress) as work,
    ):
        install(work.disks)
        for remark in remarks(found):
            log.warning("%s", remark)
        return view(kept.manifest, work.disks, None)


def plan_restore(kept: Kept, request: Request) -> Plan:
    """What restore() would do; nothing is touched."""
    from ..plan.steps import Direct, Plan  # which a restore itself does without

    request = settled(request)
    found = volumes(request.onto)
    places = place(kept.manifest, request, found)
    check(kept.lineage, kept.points, kept.manifest, places)
    steps = tuple(Direct(str(each)) for each in places)
    return Plan(EngineName.OFFLINE, steps, notes=remarks(found))


def settled(request: Request) -> Request:
    """The request with the folder as it is called in images and definitions."""
    if request.folder is None:
        return request
    return replace(request, folder=request.folder.resolve())


def volumes(onto: Mapping[str, Path]) -> dict[str, Found]:
    """What is under the names of the volumes.  Raises InvalidRequest."""
    return {disk: look(path) for disk, path in onto.items()}


def view(manifest: Manifest, done: Sequence[Staged], domain: DomainView | None) -> RestoreView:
    """What is told of a restore."""
    disks = tuple(
        RestoredDisk(
            each.place.disk, str(each.place.path), each.place.format, each.bytes, each.place.size
        )
        for each in done
    )
    return RestoreView(manifest.name, domain, disks)


@contextmanager
def made(folder: Path | None) -> Iterator[None]:
    """Have a folder, and none where there was none if the block fails.  Raises RestoreFailed."""
    if folder is None or folder.is_dir():
        yield
        return
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        for each in reversed(missing):
            each.mkdir(mode=FOLDER_MODE)
        if not folder.is_dir():
            raise RestoreFailed(f"{folder} is not a folder", hint="name another one")
    except OSError as error:
        raise RestoreFailed(f"the folder {folder} cannot be made: {error.strerror}") from error
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in missing:
                each.rmdir()
        raise
