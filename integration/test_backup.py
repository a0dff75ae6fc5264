"""backup: restore points whose images hold just what the domain held at their instant."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.manifest import Manifest
from ckptmgr.operation import backup as operation
from integration.conftest import MakeMachine
from integration.stand import DiskSpec, Machine

MIB = 1 << 20


def disk_in(image: Path) -> bytes:
    """What QEMU reads in an image and all below it."""
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
    raw = image.parent.parent / "seen.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


class Backups:
    """A machine, its repository, and what its disks held at each point."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.repository = folder / "repository"
        self.store = folder / "store"
        self.held: dict[str, dict[str, bytes]] = {}
        self.engine = "auto"

    @contextlib.contextmanager
    def domain(self) -> Iterator[ckptmgr.Domain]:
        with ckptmgr.connect(self.machine.uri, store=self.store, engine=self.engine) as host:
            yield host.domain(self.machine.name)

    def take(self, name: str, **options: object) -> Manifest:
        targets = [disk.target for disk in self.machine.disks if self.machine.active]
        before = {target: self.machine.contents(target) for target in targets}
        request = operation.Request(self.repository, name, **options)  # type: ignore[arg-type]
        with self.domain() as domain:
            made = operation.backup(domain._now, request, lambda disk, done, total: None)
        self.held[name] = before
        return made

    def image(self, manifest: Manifest, target: str) -> Path:
        return self.repository / manifest.domain_uuid / manifest.name / f"{target}.qcow2"

    def check(self, *manifests: Manifest) -> None:
        for manifest in manifests:
            for disk in manifest.disks:
                held = self.held[manifest.name][disk.name]
                assert disk_in(self.image(manifest, disk.name)) == held, (manifest.name, disk.name)


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_every_point_holds_what_the_disks_held(
    make_vm: MakeMachine, tmp_path: Path, engine: str
) -> None:
    disks = [DiskSpec("vda"), DiskSpec("vdb", size=8 * MIB + 512, cluster_size=4096)]
    backups = Backups(make_vm(disks, state="running"), tmp_path)
    backups.engine = engine
    machine = backups.machine
    rand = random.Random(1)

    def write() -> None:
        for target in ("vda", "vdb"):
            for _ in range(6):
                machine.write(
                    target,
                    rand.randrange(1000) * 4096,
                    rand.choice([4096, 65536, 200 * 1024]),
                    rand.randrange(256),
                )

    write()
    first = backups.take("first")
    write()
    second = backups.take("second")
    third = backups.take("third")
    backups.check(first, second, third)
    assert [disk.mode for disk in first.disks] == ["full", "full"]
    assert [(disk.mode, disk.base, disk.reason) for disk in second.disks] == [
        ("incremental", "first", None)
    ] * 2
    assert third.parent == "second"
    assert all(disk.bytes <= 8 * BLOCK for disk in third.disks)
