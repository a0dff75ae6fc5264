"""Repositories for tests, made through the package's own Draft; their images are mere bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptmgr.backup.block import ZERO, digest
from ckptmgr.backup.digests import Digests, DigestWriter
from ckptmgr.backup.manifest import Manifest, PointDisk
from ckptmgr.backup.repository import Draft, Lineage, Repository

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
OTHER_UUID = "0a1b2c3d-0000-4000-8000-97f2502e193f"
NOON = 1795348800  # 2026-11-22T12:00:00Z
SIZE = 8 * 65536


def identity(name: str) -> str:
    """An id, the same for every point of that name."""
    return hashlib.md5(name.encode()).hexdigest()


def point_disk(name: str = "vda", base: str | None = None, **known: Any) -> PointDisk:
    values: dict[str, Any] = {
        "mode": "full" if base is None else "incremental",
        "base_id": None if base is None else identity(base),
        "file": f"{name}.qcow2",
        "bytes": 10,
        "virtual_size": SIZE,
        "digests": f"{name}.digests",
        "digests_sha256": "0" * 64,
        "format": "qcow2",
    }
    return PointDisk(name=name, base=base, **(values | known))


def manifest(name: str, parent: str | None = None, **known: Any) -> Manifest:
    """A point that stands on its parent with vda."""
    values: dict[str, Any] = {
        "id": identity(name),
        "domain_name": "web",
        "domain_uuid": UUID,
        "parent_id": None if parent is None else identity(parent),
        "checkpoint": name,
        "checkpoint_created": NOON,
        "created": NOON,
        "disks": (point_disk(base=parent),),
    }
    return Manifest(name=name, parent=parent, **(values | known))


def write_digests(path: Path, blocks: Mapping[int, bytes], size: int = SIZE) -> str:
    """A file of digests; `blocks` as their content, b"" for zero.  Returns the file's digest."""
    writer = DigestWriter(path, size)
    for block, content in sorted(blocks.items()):
        writer.add(block, digest(content) if content else ZERO)
    writer.close()
    with Digests(path) as found:
        return found.sha256


def fill_draft(draft: Draft, made: Manifest) -> Manifest:
    """Write what `made` names; returns it with the sizes and digests of what was written."""
    disks = []
    for disk in made.disks:
        content = f"image of {disk.name} at {made.name}".encode()
        draft.path(disk.file).write_bytes(content)
        sum_ = write_digests(draft.path(disk.digests), {1: made.name.encode(), 3: ZERO})
        disks.append(replace(disk, bytes=len(content), digests_sha256=sum_))
    domain = draft.write("domain", "domain.xml", f"<domain>{made.name}</domain>".encode())
    return replace(made, disks=tuple(disks), files=(domain,))


def commit(lineage: Lineage, made: Manifest) -> Manifest:
    """A point in the lineage, whose lock is held."""
    draft = lineage.draft(made.name)
    whole = fill_draft(draft, made)
    draft.commit(whole)
    return whole


def filled(path: Path, *only: str) -> Lineage:
    """monday <- tuesday <- wednesday, and friday on tuesday, in a repository at `path`."""
    repository = Repository(path)
    repository.make()
    lineage = repository.lineage(UUID)
    with lineage.lock(0):
        for day, (name, parent) in enumerate(
            [
                ("monday", None),
                ("tuesday", "monday"),
                ("wednesday", "tuesday"),
                ("friday", "tuesday"),
            ]
        ):
            if not only or name in only:
                commit(lineage, manifest(name, parent, created=NOON + 86400 * day))
    return lineage
