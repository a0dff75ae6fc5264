"""restore: what comes back is what was there, or it is said that it is not."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.stand import DiskSpec, Machine
from integration.test_backup import Backups

MIB = 1 << 20


def scribble(machine: Machine, seed: int) -> None:
    """Write here and there to every disk; some of it zeroes."""
    rand = random.Random(seed)
    for disk in machine.disks:
        for _ in range(5):
            length = rand.choice([4096, 65536, 200 * 1024])
            offset = rand.randrange((disk.size - length) // 4096) * 4096
            machine.write(disk.target, offset, length, rand.choice([0, rand.randrange(256)]))


@pytest.fixture(name="backups")
def backups_fixture(make_vm: MakeMachine, tmp_path: Path) -> Backups:
    """monday <- tuesday <- wednesday, of a qcow2 and a raw disk."""
    disks = [DiskSpec("vda"), DiskSpec("vdb", size=8 * MIB + 512, format="raw")]
    backups = Backups(make_vm(disks, state="running"), tmp_path)
    for seed, name in enumerate(("monday", "tuesday", "wednesday")):
        scribble(backups.machine, seed)
        backups.take(name)
    return backups


def held(backups: Backups, point: str, target: str) -> bytes:
    """What a disk held at a point, in whole sectors."""
    data = backups.held[point][target]
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize("point", ["monday", "tuesday", "wednesday"])
def test_every_point_comes_back_byte_for_byte(backups: Backups, point: str, tmp_path: Path) -> None:
    repository = ckptmgr.repository(backups.repository)
    name = backups.machine.name
    overlays = repository.restore(name, point, tmp_path / "overlays")
    flat = repository.restore(name, point, tmp_path / "flat", flatten=True)
    volume = tmp_path / "volume"
    volume.write_bytes(os.urandom(9 * MIB + 100))
    onto = repository.restore(name, point, onto={"vdb": volume})
    for disk in (*overlays.disks, *flat.disks):
        form = ["-f", disk.format]
        raw = tmp_path / "seen.raw"
        subprocess.run(["qemu-img", "convert", *form, "-O", "raw", disk.file, raw], check=True)
        assert raw.read_bytes() == held(backups, point, disk.name), disk
    assert [disk.format for disk in flat.disks] == ["qcow2", "raw"]
    assert [(disk.file, disk.format) for disk in onto.disks] == [(str(volume), "raw")]
    data = held(backups, point, "vdb")
    assert volume.read_bytes() == data + bytes(9 * MIB + 100 - len(data))
