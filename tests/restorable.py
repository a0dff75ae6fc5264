"""A repository whose images are real ones, so that they can be restored from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckptmgr.backup.block import BLOCK, digest
from ckptmgr.backup.digests import Digests, DigestWriter
from ckptmgr.backup.manifest import Manifest
from ckptmgr.backup.qcow2 import Qcow2Writer
from ckptmgr.backup.repository import Lineage, Repository

from .repositories import NOON, SIZE, UUID, manifest, point_disk

Blocks = Mapping[int, bytes]
"""What the images of a point hold, by number; b"": zeroes."""


def block(seed: int, length: int = BLOCK) -> bytes:
    """Bytes of a block."""
    return random.Random(seed).randbytes(length)


def add(lineage: Lineage, made: Manifest, blocks: Mapping[str, Blocks]) -> Manifest:
    """Make a point with just these blocks, by disk; the lineage is locked."""
    draft = lineage.draft(made.name)
    disks = []
    for disk in made.disks:
        backing = None if disk.base is None else f"../{disk.base}/{disk.file}"
        image = Qcow2Writer(draft.path(disk.file), disk.virtual_size, backing=backing)
        digests = DigestWriter(draft.path(disk.digests), disk.virtual_size)
        for number, data in sorted(blocks[disk.name].items()):
            if data:
                image.write(number, memoryview(data))
                digests.add(number, digest(data))
            else:
                image.zero(number, 1)
                digests.zero(number, 1)
        size = image.close()
        digests.close()
        with Digests(draft.path(disk.digests)) as found:
            disks.append(replace(disk, bytes=size, digests_sha256=found.sha256))
    domain = draft.write("domain", "domain.xml", f"<domain>{made.name}</domain>".encode())
    whole = replace(made, disks=tuple(disks), files=(domain,))
    draft.commit(whole)
    return whole


def restorable(path: Path) -> Lineage:
    """monday <- tuesday, of vda (qcow2) and vdb (raw)."""
    repository = Repository(path)
    repository.make()
    lineage = repository.lineage(UUID)
    with lineage.lock(0):
        for name, base, seed in (("monday", None, 0), ("tuesday", "monday", 100)):
            disks = (point_disk(base=base), point_disk("vdb", base, format="raw"))
            made = manifest(name, base, created=NOON + seed, disks=disks)
            vda = {0: block(seed), 3: block(seed + 1), **({5: b""} if base else {5: block(7)})}
            add(lineage, made, {"vda": vda, "vdb": {1: block(seed + 2)}})
    return lineage


def content(point: str) -> bytes:
    """What vda holds at a point of `restorable`."""
    seed, five = (0, block(7)) if point == "monday" else (100, bytes(BLOCK))
    blocks = {0: block(seed), 3: block(seed + 1), 5: five}
    return b"".join(blocks.get(number, bytes(BLOCK)) for number in range(SIZE // BLOCK))
