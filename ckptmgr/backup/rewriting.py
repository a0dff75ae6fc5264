"""The change of a point whose images were merged with those that it stood on.

prune.json   {"point": "tuesday", "images": {".vda.qcow2.<16 hex>.tmp": "vda.qcow2"},
              "manifest": ".manifest.json.<16 hex>.tmp", "sha256": "…"}

New images, digests and manifest lie, durable, in the point's folder before this record is
written.  Then the images get their names, one by one: what is seen through an image is the same
before and after, for all that stand on it.  The manifest comes last.  New digests have names of
their own from the start, so the old manifest and the old digests hold until then: they speak of a
part of what the new image holds.  Whatever interrupts that, `complete` does the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import check_name
from ..errors import InvalidRequest, RepositoryDamaged, StoreDamaged
from ..store import files, seal
from .failure import failing, of_the_repository
from .manifest import Manifest, parse_manifest

RECORD = "prune.json"
"""Name of the record in the lineage's folder."""

_FINAL = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]{0,120}")
_DIGESTS = re.compile(r"[A-Za-z0-9_-]{1,32}(\.[0-9a-f]{16})?\.digests")


@dataclass(frozen=True)
class Rewriting:
    """A change of a point under way.

    images -- the new name in the point's folder, by the temporary one
    manifest -- the temporary name of the new manifest
    """

    point: str
    images: Mapping[str, str]
    manifest: str

    def serialize(self) -> bytes:
        """The file."""
        return seal.seal_json(
            {"point": self.point, "images": dict(self.images), "manifest": self.manifest}
        )

    @classmethod
    def deserialize(cls, data: bytes) -> Rewriting:
        """The record in a file.  Raises StoreDamaged."""
        members = seal.unseal_json(data)
        point, images, manifest = (members.get(key) for key in ("point", "images", "manifest"))
        if not (
            isinstance(point, str)
            and isinstance(images, dict)
            and _is_temporary(manifest)
            and all(map(_is_temporary, images))
            and all(isinstance(name, str) and _FINAL.fullmatch(name) for name in images.values())
        ):
            raise StoreDamaged("it is not the record of a prune")
        try:
            return cls(check_name(point), images, str(manifest))
        except InvalidRequest as error:
            raise StoreDamaged(error.message) from error


def temporary(name: str) -> str:
    """A temporary name for a file that is to be called `name`."""
    return f".{name}.{os.urandom(8).hex()}.tmp"


def new_digests(disk: str) -> str:
    """A name for new digests of `disk`, which no file has had."""
    return f"{disk}.{os.urandom(8).hex()}.digests"


def read(lineage: Path) -> Rewriting | None:
    """The change under way in a lineage, if there is one.

    Raises RepositoryDamaged, RepositoryFailed.
    """
    path = lineage / RECORD
    with failing(path, "cannot be read"):
        try:
            return Rewriting.deserialize(files.read(path))
        except FileNotFoundError:
            return None
        except StoreDamaged as error:
            raise RepositoryDamaged(
                f"{path}, the record of an interrupted prune, cannot be used: {error.message}",
                hint="move it away, then see what `ckptmgr verify` says",
            ) from error


def seen(lineage: Path, rewriting: Rewriting, manifest: Manifest) -> Manifest:
    """`manifest` as it is true for the images that are there while the change is under way."""
    folder = lineage / rewriting.point
    if manifest.name != rewriting.point or not os.path.lexists(folder / rewriting.manifest):
        return manifest
    renamed = {
        final for staged, final in rewriting.images.items() if not os.path.lexists(folder / staged)
    }
    try:
        with of_the_repository():
            new = parse_manifest(files.read(folder / rewriting.manifest))
    except (OSError, RepositoryDamaged):
        return manifest
    disks = [
        found if disk.file in renamed and (found := new.disk(disk.name)) is not None else disk
        for disk in manifest.disks
    ]
    return replace(manifest, disks=tuple(disks))


def begin(lineage: Path, rewriting: Rewriting) -> None:
    """Record a change whose files are all there.  Raises RepositoryFailed."""
    with of_the_repository():
        files.sync_folder(lineage / rewriting.point)
        files.write(lineage / RECORD, rewriting.serialize())


def complete(lineage: Path, rewriting: Rewriting, manifest_name: str) -> None:
    """Do what is still to be done of a change.  Raises RepositoryFailed."""
    folder = lineage / rewriting.point
    with of_the_repository():
        for staged, final in [*rewriting.images.items(), (rewriting.manifest, manifest_name)]:
            if os.path.lexists(folder / staged):
                files.move(folder / staged, folder / final)
        files.remove(lineage / RECORD)


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove what an interrupted or completed change left in a point's folder.

    Raises RepositoryFailed.
    """
    with of_the_repository(), files.failing(folder, "cannot be read"):
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 -- names, not paths
            if is_left(name, manifest):
                files.remove(folder / name, sync=False)  # what comes back is swept again


def is_left(name: str, manifest: Manifest) -> bool:
    """Whether a file in the point's folder is one that a change left there."""
    if name in manifest.file_names:
        return False
    return _is_temporary(name) or _DIGESTS.fullmatch(name) is not None


def _is_temporary(name: object) -> bool:
    return isinstance(name, str) and "/" not in name and bool(files.TEMPORARY.fullmatch(name))
