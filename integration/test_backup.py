"""backup: restore points whose images hold just what the domain held at their instant."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.manifest import Manifest
from ckptmgr.engine.monitor import CREATION
from ckptmgr.operation import backup as operation
from integration.conftest import MakeMachine
from integration.evidence import has_checkpoints
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
        self.repositories: dict[str, Path] = {}
        self.engine = "auto"

    @contextlib.contextmanager
    def domain(self) -> Iterator[ckptmgr.Domain]:
        with ckptmgr.connect(self.machine.uri, store=self.store, engine=self.engine) as host:
            yield host.domain(self.machine.name)

    def contents(self) -> dict[str, bytes]:
        return {disk.target: self.machine.contents(disk.target) for disk in self.machine.disks}

    def crash(self) -> None:
        """Start the machine, kill its QEMU, and repair what that leaves of the bitmaps."""
        self.machine.start()
        self.machine.kill()
        with self.domain() as domain:
            assert {each.code for each in domain.check()} == {"inconsistent-bitmap"}
            domain.repair()
            assert domain.check() == ()

    def io(self, target: str, command: str) -> None:
        """Something that the device does, in the words of qemu-io."""
        device = self.machine.device(target)
        said = self.machine.hmp(f'qemu-io -d {device} "{command}"')
        assert "rror" not in said and "ailed" not in said, said

    def scatter(self, seed: int) -> None:
        """Write here and there."""
        rand = random.Random(seed)
        for disk in self.machine.disks:
            for _ in range(6):
                length = rand.choice([512, 4096, BLOCK, 200 * 1024])
                place = rand.randrange((disk.size - length) // 512) * 512
                self.machine.write(disk.target, place, length, rand.randrange(256))

    def take(
        self,
        name: str,
        *,
        held: dict[str, bytes] | None = None,
        repository: Path | None = None,
        progress: operation.Progress = lambda disk, done, total: None,
        **options: Any,
    ) -> Manifest:
        before = held or self.contents()
        request = operation.Request(repository or self.repository, name, **options)
        self.repositories[name] = request.repository
        with self.domain() as domain:
            _, made = operation.backup(domain._now, request, progress)
        self.held[name] = before
        return made

    def image(self, manifest: Manifest, target: str) -> Path:
        return (
            self.repositories[manifest.name]
            / manifest.domain_uuid
            / manifest.name
            / f"{target}.qcow2"
        )

    def check(self, *manifests: Manifest) -> None:
        for manifest in manifests:
            for disk in manifest.disks:
                held = self.held[manifest.name][disk.name]
                assert disk_in(self.image(manifest, disk.name)) == held, (manifest.name, disk.name)


def modes(manifest: Manifest) -> dict[str, str]:
    return {disk.name: disk.mode for disk in manifest.disks}


@pytest.fixture
def backups(make_vm: MakeMachine, tmp_path: Path) -> Callable[..., Backups]:
    def make(*disks: DiskSpec, state: str = "running", engine: str = "auto") -> Backups:
        made = Backups(make_vm(list(disks), state=state), tmp_path)
        made.engine = engine
        return made

    return make


MakeBackups = Callable[..., Backups]


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_every_point_holds_what_the_disks_held(backups: MakeBackups, engine: str) -> None:
    small = DiskSpec("vdb", size=8 * MIB + 512, cluster_size=4096)
    vm = backups(DiskSpec("vda", backing=("qcow2", "raw")), small, engine=engine)
    vm.scatter(1)
    first = vm.take("first")
    vm.scatter(2)
    second = vm.take("second")
    third = vm.take("third")
    vm.check(first, second, third)
    assert modes(first) == {"vda": "full", "vdb": "full"}
    assert [(disk.mode, disk.base, disk.reason) for disk in second.disks] == [
        ("incremental", "first", None)
    ] * 2
    assert third.parent == "second"
    assert all(disk.bytes <= 8 * BLOCK for disk in third.disks), "nothing changed"


def test_a_scratch_file_that_a_killed_backup_was_making_is_no_obstacle(
    backups: MakeBackups, tmp_path: Path
) -> None:
    vm = backups(DiskSpec("vda"), engine="monitor")
    vm.scatter(1)
    options = {"driver": "file", "filename": str(tmp_path / "scratch"), "size": 0}
    vm.machine.qmp("blockdev-create", **{"job-id": CREATION}, options=options)
    vm.check(vm.take("first"))
    assert vm.machine.qmp("query-jobs") == []


def test_compressed_points_are_smaller_and_hold_the_same(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"))
    vm.machine.write("vda", 0, 16 * MIB, 0x41)
    packed = vm.take("packed", compress=True)
    vm.machine.write("vda", 5 * MIB, 3 * MIB, 0x42)
    more = vm.take("more", compress=True)
    vm.check(packed, more)
    assert packed.disks[0].bytes < MIB


def test_zeroes_and_discards_come_back_as_zeroes_and_cost_a_record(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"))
    vm.machine.write("vda", 0, 32 * MIB, 0x41)
    first = vm.take("first")
    vm.io("vda", "write -z 1M 8M")
    vm.io("vda", "discard 16M 8M")
    vm.machine.write("vda", 26 * MIB, MIB, 0)
    second = vm.take("second")
    vm.check(first, second)
    assert modes(second) == {"vda": "incremental"}
    assert second.disks[0].bytes <= 8 * BLOCK


@pytest.mark.each_release
def test_a_stopped_domain_is_backed_up_from_its_images(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"), DiskSpec("vdb", format="raw"))
    vm.scatter(1)
    first = vm.take("first")
    vm.scatter(2)
    held = vm.contents()
    vm.machine.stop()
    second = vm.take("second", held=held)
    vm.machine.start(paused=False)
    vm.scatter(3)
    third = vm.take("third")
    vm.check(first, second, third)
    assert modes(second) == modes(third) == {"vda": "incremental", "vdb": "incremental"}
    assert {disk.name: disk.reason is None for disk in third.disks} == {"vda": True, "vdb": False}


def test_raw_disks_alone_are_read_whole_and_stored_where_they_differ(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda", format="raw"))
    vm.scatter(1)
    first = vm.take("first")
    vm.machine.write("vda", 7 * MIB, BLOCK, 0x77)
    second = vm.take("second")
    vm.check(first, second)
    # where the engine is the monitor, raw disks are tracked
    assert first.checkpoint == (None if has_checkpoints(vm.machine) else "first")
    assert second.parent == "first"
    assert modes(second) == {"vda": "incremental"}
    assert second.disks[0].bytes <= 9 * BLOCK


@pytest.mark.each_release
def test_after_a_crash_only_what_differs_is_stored(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"))
    vm.scatter(1)
    first = vm.take("first")
    vm.machine.write("vda", 3 * MIB, BLOCK, 0x33)
    vm.io("vda", "flush")
    vm.machine.kill()
    vm.machine.start(paused=False)
    vm.machine.write("vda", 9 * MIB, BLOCK, 0x99)
    second = vm.take("second")
    vm.check(first, second)
    (disk,) = second.disks
    assert disk.mode == "incremental"
    assert disk.reason is not None
    assert disk.bytes <= 10 * BLOCK


def test_two_repositories_do_not_disturb_each_other(backups: MakeBackups, tmp_path: Path) -> None:
    vm = backups(DiskSpec("vda"))
    vm.scatter(1)
    made = [vm.take("one"), vm.take("other", repository=tmp_path / "other")]
    for number in range(2, 5):
        vm.scatter(number)
        made.append(vm.take(f"one{number}"))
        vm.scatter(number + 10)
        made.append(vm.take(f"other{number}", repository=tmp_path / "other"))
    vm.check(*made)
    assert all(disk.reason is None for point in made[2:] for disk in point.disks)
    assert [point.parent for point in made] == [
        None, None, "one", "other", "one2", "other2", "one3", "other3",
    ]  # fmt: skip


def test_a_new_and_a_grown_disk_cost_themselves_alone(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"), DiskSpec("vdb", size=8 * MIB + 512))
    vm.scatter(1)
    first = vm.take("first", disks=("vdb",))
    vm.machine.domain.blockResize("vdb", 12 * MIB + 1024, 1)  # VIR_DOMAIN_BLOCK_RESIZE_BYTES
    vm.machine.write("vdb", 11 * MIB, BLOCK, 0x11)
    second = vm.take("second")
    third = vm.take("third")
    vm.check(first, second, third)
    assert modes(first) == {"vdb": "full"}
    assert modes(second) == {"vda": "full", "vdb": "incremental"}
    assert modes(third) == {"vda": "incremental", "vdb": "incremental"}


def test_a_reverted_domain_goes_on_from_the_right_point(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"))
    vm.scatter(1)
    first = vm.take("first")
    with vm.domain() as domain:
        domain.create_snapshot("then")
    vm.scatter(2)
    second = vm.take("second")
    with vm.domain() as domain:
        domain.revert_snapshot("then")
    vm.scatter(3)
    branch = vm.take("branch")
    vm.check(first, second, branch)
    assert (second.parent, branch.parent) == ("first", "first")
    assert branch.disks[0].reason is None


def test_a_point_whose_image_was_cut_off_is_not_stood_on(backups: MakeBackups) -> None:
    vm = backups(DiskSpec("vda"))
    vm.scatter(1)
    first = vm.take("first")
    with vm.image(first, "vda").open("r+b") as file:
        file.truncate(BLOCK)
    second = vm.take("second")
    vm.check(second)
    assert modes(second) == {"vda": "full"}
    assert second.disks[0].reason is not None
