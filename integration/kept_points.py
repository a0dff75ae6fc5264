"""Repositories of real images with a model beside them: what a guest sees at every point."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from ckptmgr.backup.block import BLOCK, ZERO, block_count, digest
from ckptmgr.backup.digests import Digests, DigestWriter
from ckptmgr.backup.manifest import FULL, INCREMENTAL, Manifest, PointDisk
from ckptmgr.backup.qcow2 import Qcow2Writer
from ckptmgr.backup.repository import Lineage, Repository

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
NOON = 1795348800  # 2026-11-22T12:00:00Z, a Sunday
DAY = 86400


def seen(content: bytes, size: int) -> bytes:
    """What an image of `size` bytes without data of its own shows of a base with `content`."""
    return content[:size].ljust(size, b"\0")


def block_of(content: bytes, block: int) -> bytes:
    return content[block * BLOCK : (block + 1) * BLOCK]


@dataclass
class Kept:
    """A lineage and, by point and disk, what is seen there."""

    lineage: Lineage
    contents: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path) -> Kept:
        repository = Repository(path)
        repository.make()
        return cls(repository.lineage(UUID))

    @property
    def repository(self) -> Path:
        return self.lineage.path.parent

    def add(
        self,
        name: str,
        parent: str | None,
        contents: dict[str, bytes],
        *,
        full: Iterable[str] = (),
        again: Iterable[int] = (),
        edges: bool = True,
        created: int | None = None,
        compress: bool = False,
        uuid: str = UUID,
    ) -> Manifest:
        """A point after `parent` with disks of these contents, as increments where that can be.

        full -- disks that are no increments
        again -- blocks that the increments hold though they have not changed
        edges -- hold the last block of a disk where its length is another one than the base's, as
                 `backup` does; else a larger image below may have more of it than is seen
        """
        points = self.lineage.load().points
        with self.lineage.lock(0):
            draft = self.lineage.draft(name)
            disks = []
            for target, content in contents.items():
                line = [] if parent is None else [parent, *points.ancestors(parent)]
                base = next((each for each in line if target in self.contents[each]), None)
                if target in full:
                    base = None
                disks.append(
                    self._disk(draft.folder, target, content, base, set(again), edges, compress)
                )
            files = (draft.write("domain", "domain.xml", b"<domain type='kvm'/>"),)
            made = Manifest(
                id=hashlib.md5(name.encode()).hexdigest(),
                name=name,
                domain_name="web",
                domain_uuid=uuid,
                parent=parent,
                parent_id=None if parent is None else points.get(parent).id,
                checkpoint=name,
                checkpoint_created=NOON,
                created=NOON + DAY * len(self.contents) if created is None else created,
                disks=tuple(disks),
                files=files,
            )
            draft.commit(made)
        self.contents[name] = dict(contents)
        return made

    def _disk(
        self,
        folder: Path,
        target: str,
        content: bytes,
        base: str | None,
        again: set[int],
        edges: bool,
        compress: bool,
    ) -> PointDisk:
        size = len(content)
        before = b"" if base is None else self.contents[base][target]
        below = seen(before, size)
        image, digests = folder / f"{target}.qcow2", folder / f"{target}.digests"
        backing = None if base is None else f"../{base}/{target}.qcow2"
        writer = Qcow2Writer(image, size, backing=backing, compressed=compress)
        sums = DigestWriter(digests, size)
        compressor = zstandard.ZstdCompressor(level=1)
        for block in range(block_count(size)):
            data = block_of(content, block)
            cut = edges and len(data) != len(block_of(before, block))
            if data == block_of(below, block) and block not in again and not (cut and any(data)):
                continue
            if not any(data):
                writer.zero(block, 1)
                sums.add(block, ZERO)
                continue
            frame = compressor.compress(data)
            if compress and len(data) == BLOCK and len(frame) < BLOCK:
                writer.write_compressed(block, [frame])
            else:
                writer.write(block, memoryview(data))
            sums.add(block, digest(data))
        length = writer.close()
        sums.close()
        with Digests(digests) as written:
            sha256 = written.sha256
        return PointDisk(
            name=target,
            mode=FULL if base is None else INCREMENTAL,
            base=base,
            base_id=None if base is None else self.lineage.load().points.get(base).id,
            file=image.name,
            bytes=length,
            virtual_size=size,
            digests=digests.name,
            digests_sha256=sha256,
            format="qcow2",
            compression="zstd" if compress else None,
        )

    def require(self, names: Iterable[str] | None = None, *, qemu: bool = True) -> None:
        """Every point that is there (these, if named) is whole and shows what it showed.

        qemu -- to QEMU too
        """
        loaded = self.lineage.load()
        assert loaded.damaged == ()
        if names is not None:
            assert set(loaded.points.manifests) == set(names)
        for name, manifest in loaded.points.manifests.items():
            assert loaded.points.broken(name) is None
            assert {disk.name for disk in manifest.disks} == set(self.contents[name])
            for disk in manifest.disks:
                path = self.lineage.image(manifest, disk.name)
                content = self.contents[name][disk.name]
                assert disk.virtual_size == len(content)
                assert peek(path) == content, f"{disk.name} of {name}"
                if qemu:
                    assert shown(path) == content, f"{disk.name} of {name}"
                self.require_digests(manifest, disk.name)

    def require_digests(self, manifest: Manifest, disk: str) -> None:
        """The digests say what the layers hold: nothing less, and nothing that is not there."""
        from ckptmgr.backup.digests import effective

        points = self.lineage.load().points
        chain = points.chain(manifest.name, disk)
        opened = [Digests(self.lineage.digests(points.get(name), disk)) for name in chain]
        try:
            for name, digests in zip(chain, opened, strict=True):
                recorded = points.disk(name, disk)
                assert digests.sha256 == recorded.digests_sha256
                assert self.lineage.image(points.get(name), disk).stat().st_size == recorded.bytes
            content = self.contents[manifest.name][disk]
            for block in range(block_count(len(content))):
                data = block_of(content, block)
                found = effective(opened, block)
                held = [each for each in opened if each.find(block) is not None]
                if held and block_count(held[0].size) == block + 1 and held[0].size % BLOCK:
                    continue  # a short last block counts as it is
                assert found == (digest(data) if any(data) else ZERO), (disk, block)
        finally:
            for each in opened:
                each.close()


def shown(path: Path) -> bytes:
    """What QEMU reads from an image on its chain."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True
        )
        return raw.read_bytes()


def peek(path: Path) -> bytes:
    """The same as `shown`, without a process: where there is much to look at.

    `Kept.require` compares the two, so that one cannot be wrong unnoticed.
    """
    file = path.read_bytes()
    offset, length, bits, size = struct.unpack_from(">QIIQ", file, 8)
    below = b""
    if offset:
        below = peek(path.parent / file[offset : offset + length].decode())
    data = bytearray(seen(below, size))
    (l1,) = struct.unpack_from(">Q", file, 40)
    cluster = 1 << bits
    for number in range(block_count(size)):
        (table,) = struct.unpack_from(">Q", file, l1 + number // (cluster // 8) * 8)
        table &= (1 << 56) - 512
        if not table:
            continue
        (entry,) = struct.unpack_from(">Q", file, table + number % (cluster // 8) * 8)
        if entry & 1 << 62:
            start = entry & (1 << 62 - (bits - 8)) - 1
            content = zstandard.ZstdDecompressor().decompressobj().decompress(file[start:])
        elif entry & 1:
            content = bytes(cluster)
        elif entry:
            start = entry & (1 << 56) - 512
            content = file[start : start + cluster]
        else:
            continue
        data[number * cluster : (number + 1) * cluster] = content
    return bytes(data[:size])


def checked(path: Path) -> bool:
    """Whether `qemu-img check` finds nothing, leaks included."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", str(path)], capture_output=True, check=False
    )
    said = json.loads(done.stdout)
    return done.returncode == 0 and not said.get("leaks") and not said.get("corruptions")


def noise(seed: int, size: int) -> bytes:
    """Content whose blocks are noise, text or zeroes."""
    source = random.Random(seed)
    parts = []
    for block in range(block_count(size)):
        kind = source.choice(["noise", "text", "zero"])
        if kind == "noise":
            parts.append(source.randbytes(BLOCK))
        elif kind == "text":
            parts.append((b"%d of %d " % (block, seed) * BLOCK)[:BLOCK])
        else:
            parts.append(bytes(BLOCK))
    return b"".join(parts)[:size]


def changed(content: bytes, seed: int, *, size: int | None = None) -> bytes:
    """`content` with some blocks changed, and another size."""
    source = random.Random(seed)
    size = len(content) if size is None else size
    data = bytearray(seen(content, size))
    fresh = noise(seed + 1, size)
    for block in range(block_count(size)):
        if source.random() < 0.3:
            data[block * BLOCK : (block + 1) * BLOCK] = block_of(fresh, block)
    return bytes(data)
