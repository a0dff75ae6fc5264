"""Whether what a repository holds is what was written: every file, every relation, every block.

Each layer, which is one image by itself, is looked at once, however many points stand on it.  What
was found names the point that is damaged, and all those that cannot be trusted therefore.  Nothing
is changed, and no lock is taken: a point that somebody changes meanwhile is looked at again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import NoPoint, StoreDamaged
from ..store import files
from . import overlays, rewriting
from .inspection import inspect, reason
from .manifest import PointFile
from .points import Points
from .repository import GONE, LOCK, MANIFEST, PARTIAL, Lineage, Loaded
from .views import VerifyFinding

log = logging.getLogger("ckptmgr")

_AT_ONCE = 1 << 20
_TRIES = 10


@dataclass(frozen=True)
class Found:
    """One thing that is wrong.

    point -- the one that is damaged, or that should be there
    disk -- the disk that is concerned; None: no one in particular
    affected -- the points that cannot be trusted therefore
    harmless -- nothing is lost by it
    """

    code: str
    point: str | None
    disk: str | None
    message: str
    affected: tuple[str, ...] = ()
    harmless: bool = False


def verify(
    lineage: Lineage, wanted: Iterable[str] | None = None
) -> tuple[int, list[VerifyFinding]]:
    """How many points were looked at, and what was found.

    wanted -- points, with all that they stand on; None: all, and whatever else lies there

    Raises NoPoint for a point that is not there, RepositoryFailed if the folder cannot be read or
    goes away, Unsupported where QEMU's tools are not installed.
    """
    names = None if wanted is None else set(wanted)
    loaded = lineage.load()
    looked_at = _looked_at(loaded, names)
    found = list(_layers(lineage, loaded.points, looked_at))
    for _ in range(_TRIES):
        if not found or (now := lineage.load()) == loaded:
            break
        lineage.require()
        # Somebody made, merged or removed points meanwhile: this may lie between two states.
        loaded = now
        suspects = {each.point for each in found}
        again = [name for name in loaded.points.by_time() if name in suspects]
        found = list(_layers(lineage, loaded.points, again))
    relevant = set(looked_at) | (names or set())
    told = [
        each
        for each in structure(loaded)
        if names is None or each.point in relevant or relevant & set(each.affected)
    ]
    told += found
    if names is None:
        told += _strays(lineage, loaded)
    damaged = {each.point for each in loaded.damaged if each.point is not None}
    count = len({*looked_at, *(damaged if names is None else damaged & names)})
    return count, [_told(lineage, loaded.points, each) for each in told]


def _layers(lineage: Lineage, points: Points, names: Iterable[str]) -> Iterator[Found]:
    """What is wrong with the files and images of points."""
    for name in names:
        log.info("verifying restore point %s", name)
        yield from _files(lineage, points, name)
        for disk in points.get(name).disks:
            affected = (name, *points.dependants(name, disk.name))
            for code, message in inspect(lineage, points, name, disk):
                yield Found(code, name, disk.name, message, affected)


def _told(lineage: Lineage, points: Points, found: Found) -> VerifyFinding:
    names = [*([] if found.point is None else [found.point]), *found.affected]
    manifests = [points.manifests[name] for name in names if name in points.manifests]
    return VerifyFinding(
        code=found.code,
        lineage=lineage.key,
        domain=manifests[0].domain_name if manifests else None,
        point=found.point,
        disk=found.disk,
        message=found.message,
        affected=found.affected,
        harmless=found.harmless,
    )


def _looked_at(loaded: Loaded, wanted: set[str] | None) -> list[str]:
    """The points to look at: those that are wanted, and what they stand on; oldest first."""
    points = loaded.points
    if wanted is None:
        return list(points.by_time())
    damaged = {damage.point for damage in loaded.damaged}
    chosen: set[str] = set()
    for name in wanted:
        if name in damaged:
            continue
        if name not in points:
            raise NoPoint(f"there is no restore point {name}")
        chosen.add(name)
        for disk in points.get(name).disks:
            chosen.update(points.reached(name, disk.name))
    return [name for name in points.by_time() if name in chosen]


# --- relations: pure -----------------------------------------------------------------------------


def structure(loaded: Loaded) -> Iterator[Found]:
    """What is wrong with manifests and relations."""
    points = loaded.points
    damaged = {damage.point: damage for damage in loaded.damaged}
    for damage in loaded.damaged:
        if damage.point is None:
            yield Found("damaged-record", None, None, damage.message)
        else:
            affected = (damage.point, *points.dependants(damage.point))
            yield Found("damaged-manifest", damage.point, None, damage.message, affected)
    for name in points.by_time():
        manifest = points.get(name)
        for disk in manifest.disks:
            if disk.base is None or disk.base in damaged:
                continue
            affected = (name, *points.dependants(name, disk.name))
            what = f"disk {disk.name} of restore point {name} stands on {disk.base}, which"
            base = points.manifests.get(disk.base)
            if base is None:
                yield Found("missing-point", disk.base, disk.name, f"{what} is missing", affected)
            elif base.id != disk.base_id:
                message = f"{what} is another point of that name"
                yield Found("replaced-point", disk.base, disk.name, message, affected)
            elif base.disk(disk.name) is None:
                message = f"{what} has no such disk"
                yield Found("missing-disk", disk.base, disk.name, message, affected)
            elif name in points.reached(disk.base, disk.name):
                message = f"{what} stands on it"
                yield Found("circular", name, disk.name, message, affected)
        parent = manifest.parent
        if parent is not None and points.parent(name) is None and parent not in damaged:
            message = f"restore point {name} comes after {parent}, which is not there"
            yield Found("missing-parent", name, None, message, harmless=True)


# --- files ---------------------------------------------------------------------------------------


def _files(lineage: Lineage, points: Points, name: str) -> Iterator[Found]:
    """What is wrong with the files of a point beside its disks."""
    for file in points.get(name).files:
        path = lineage.path / name / file.file
        if fault := _file_fault(path, file):
            code = "missing-file" if fault == _MISSING else "damaged-file"
            yield Found(code, name, None, f"{path}, its {file.role}, {fault}", (name,))


_MISSING = "is missing"


def _file_fault(path: Path, file: PointFile) -> str | None:
    try:
        descriptor = files.open_regular(path)
        try:
            content = hashlib.sha256()
            length = 0
            while part := os.read(descriptor, _AT_ONCE):
                content.update(part)
                length += len(part)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return _MISSING
    except StoreDamaged:
        return "is no file"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    if length != file.bytes or content.hexdigest() != file.sha256:
        return "is not what the manifest says"
    return None


def _strays(lineage: Lineage, loaded: Loaded) -> Iterator[Found]:
    """What lies around and is nobody's, or is left of what was interrupted."""
    left = "is left of what was interrupted: the next backup or prune clears it away"
    damaged = {damage.point for damage in loaded.damaged}
    for name in lineage.names():
        path = lineage.path / name
        if name == rewriting.RECORD:
            if not any(damage.path == path for damage in loaded.damaged):
                message = f"{path}: a prune was interrupted, and the next backup or prune goes on"
                yield Found("interrupted", None, None, message, harmless=True)
        elif PARTIAL.fullmatch(name) or GONE.fullmatch(name) or files.TEMPORARY.fullmatch(name):
            yield Found("interrupted", None, None, f"{path} {left}", harmless=True)
        elif name != LOCK and name not in loaded.points and name not in damaged:
            yield Found("stray", None, None, f"{path} is nothing of ckptmgr's", harmless=True)
    for name, manifest in loaded.points.manifests.items():
        known = {MANIFEST, overlays.RECORD, *manifest.file_names}
        try:
            there = sorted(os.listdir(lineage.path / name))  # noqa: PTH208 -- names, not paths
        except OSError:
            continue  # each of its files is told to be missing
        for file in there:
            path = lineage.path / name / file
            if file in known:
                continue
            if rewriting.is_left(file, manifest):
                yield Found("interrupted", name, None, f"{path} {left}", harmless=True)
            else:
                message = f"{path} is not in the manifest of the point"
                yield Found("stray", name, None, message, harmless=True)
