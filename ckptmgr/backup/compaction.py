"""Doing what pruning.py decided: merging images, rewriting manifests, removing points."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..engine.qemu_img import ImageServer, serve_image
from ..errors import OperationFailed, RepositoryDamaged
from ..store import files
from . import overlays, rewriting
from .copying import Source
from .digests import Digests
from .failure import of_the_repository
from .header import read_header
from .manifest import Manifest, PointDisk, format_manifest
from .merge import Layer, MergedWriter, merge, unreadable
from .points import Points
from .pruning import Merging, Pruning, Rewrite
from .repository import MANIFEST, Lineage, Loaded

log = logging.getLogger("ckptmgr")


def held_back(lineage: Lineage, loaded: Loaded) -> dict[str, tuple[str, ...]]:
    """The points that may not go, whatever their times, and why: something else stands on them.

    Raises RepositoryDamaged, RepositoryFailed.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, manifest in loaded.points.manifests.items():
        images = [disk.file for disk in manifest.disks]
        for overlay in overlays.standing(lineage.path / name, images):
            found[name] = (*found.get(name, ()), f"restored as {overlay}")
    for damage in loaded.damaged:
        if damage.point is not None:
            for base in sorted(set(_bases_of_damaged(lineage.path / damage.point))):
                found[base] = (*found.get(base, ()), f"{damage.point}, damaged, stands on it")
    return found


def _bases_of_damaged(folder: Path) -> Iterator[str]:
    """The points on which the images in a folder without a manifest stand."""
    with suppress(OSError):
        for path in sorted(folder.glob("*.qcow2")):
            with suppress(OSError, RepositoryDamaged, ValueError):
                header = read_header(path)
                parts = Path(header.backing_file or "").parts if header is not None else ()
                if len(parts) == 3 and parts[0] == "..":
                    yield parts[1]


def carry_out(lineage: Lineage, points: Points, pruning: Pruning) -> None:
    """Do all of it, under the lineage's lock.  What is done stays done, whatever fails.

    Raises RepositoryDamaged where an image that is to be merged is not what its digests say,
    RepositoryFailed.
    """
    lineage.require_lock()
    manifests = dict(points.manifests)
    for rewrite in pruning.rewrites:
        manifests[rewrite.manifest.name] = _carry_out(lineage, manifests, rewrite)
    for name in pruning.goes:
        log.info("removing restore point %s", name)
        lineage.remove(name)


@dataclass
class _Staged:
    """The new files of a point, as long as they have not replaced the old ones."""

    folder: Path
    images: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def abandon(self) -> None:
        """Remove them; not while there is a record of the change, which needs them all."""
        if os.path.lexists(self.folder.parent / rewriting.RECORD):
            return
        for name in [*self.others, *self.images]:
            with suppress(OSError):
                (self.folder / name).unlink()


def _carry_out(lineage: Lineage, manifests: dict[str, Manifest], rewrite: Rewrite) -> Manifest:
    """Rewrite one point; returns its new manifest."""
    name = rewrite.manifest.name
    folder = lineage.path / name
    if not rewrite.merges:
        with of_the_repository():
            files.write(folder / MANIFEST, format_manifest(rewrite.manifest))
        return rewrite.manifest
    staged = _Staged(folder)
    manifest = rewrite.manifest
    try:
        for merging in rewrite.merges:
            log.info(
                "merging disk %s of restore point %s with %s",
                merging.disk,
                name,
                ", ".join(merging.layers[1:]),
            )
            merged = _merge(lineage, manifests, manifest, merging, staged)
            disks = [merged if disk.name == merged.name else disk for disk in manifest.disks]
            manifest = replace(manifest, disks=tuple(disks))
        record = rewriting.Rewriting(name, staged.images, rewriting.temporary(MANIFEST))
        staged.others.append(record.manifest)
        with of_the_repository():
            output = files.Output(folder / record.manifest)
            try:
                output.append(format_manifest(manifest))
                output.close()
            except BaseException:
                output.abandon()
                raise
        rewriting.begin(lineage.path, record)
    except BaseException:
        staged.abandon()
        raise
    rewriting.complete(lineage.path, record, MANIFEST)
    rewriting.sweep(folder, manifest)
    return manifest


def _merge(
    lineage: Lineage,
    manifests: dict[str, Manifest],
    manifest: Manifest,
    merging: Merging,
    staged: _Staged,
) -> PointDisk:
    """Write the merged image and its digests beside the old ones."""
    disk = Points({manifest.name: manifest}).disk(manifest.name, merging.disk)
    image, digests = rewriting.temporary(disk.file), rewriting.new_digests(disk.name)
    backing = None
    if merging.below:
        base = Points(manifests).disk(merging.below[0], disk.name)
        backing = f"../{merging.below[0]}/{base.file}"
    with ExitStack() as stack:
        points = [manifests[name] for name in (*merging.layers, *merging.below)]
        opened = [stack.enter_context(open_digests(lineage, point, disk.name)) for point in points]
        count = len(merging.layers)
        wanted = merge(opened[:count], opened[count:])
        layers = {
            index: _layer(stack, lineage, points[index], disk.name, opened[index])
            for index in sorted({take.index for take in wanted.takes})
        }
        staged.images[image] = disk.file
        staged.others.append(digests)
        writer = MergedWriter(
            staged.folder / image,
            staged.folder / digests,
            disk.virtual_size,
            backing=backing,
            compress=disk.compression is not None,
        )
        try:
            writer.write(wanted, layers)
            length = writer.close()
        except BaseException:
            writer.abandon()
            raise
    with Digests(staged.folder / digests) as written:
        return replace(disk, bytes=length, digests=digests, digests_sha256=written.sha256)


def open_digests(lineage: Lineage, point: Manifest, disk: str) -> Digests:
    """The digests of a disk of a point, which are the ones that its manifest means.

    Raises RepositoryDamaged, RepositoryFailed.
    """
    recorded = Points({point.name: point}).disk(point.name, disk)
    path = lineage.digests(point, disk)
    digests = Digests(path)
    if digests.sha256 != recorded.digests_sha256 or digests.size != recorded.virtual_size:
        digests.close()
        raise RepositoryDamaged(f"the digests {path} are not the ones that the manifest means")
    return digests


def _layer(
    stack: ExitStack, lineage: Lineage, point: Manifest, disk: str, digests: Digests
) -> Layer:
    """The image of a point by itself, to be read as long as `stack` is open."""
    path = lineage.image(point, disk)
    what = f"disk {disk} of restore point {point.name} ({path})"
    return Layer(what, digests, stack.enter_context(alone(path, disk, what, digests.size)))


@contextmanager
def alone(path: Path, disk: str, what: str, size: int) -> Iterator[Source]:
    """What an image of a disk of `size` bytes holds without its backing file.

    what -- names it in messages

    Raises RepositoryDamaged for one that QEMU's programs cannot open, or that is not what we wrote.
    """
    with ExitStack() as stack:
        server = stack.enter_context(serving(path, disk, what, size))
        try:
            source = stack.enter_context(Source(server.socket, "", disk, check=server.check))
        except OperationFailed as error:
            raise unreadable(what, error) from error
        yield source


@contextmanager
def serving(path: Path, disk: str, what: str, size: int) -> Iterator[ImageServer]:
    """The server of that; the header is looked at before any program of QEMU's sees the image.

    Raises RepositoryDamaged.
    """
    try:
        header = read_header(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RepositoryDamaged(f"{what} cannot be read: {reason}") from error
    if header is None or header.has_data_file or header.size != size:
        raise RepositoryDamaged(f"{what} is damaged: it has not the header that was written")
    with serve_image(disk, str(path), chain=False) as server:
        yield server
