"""restore: what comes back is what was there, or it is said that it is not."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup.block import BLOCK
from ckptmgr.domain.locks import is_being_written
from ckptmgr.store import files
from integration.conftest import MakeMachine
from integration.stand import DiskSpec, Machine
from integration.stand.patience import patiently
from integration.test_backup import Backups

MIB = 1 << 20

# What is new in it is decided by our own code, whatever the libvirt and QEMU.
detail = pytest.mark.not_on_stacks("one of its kind is run there")


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


@pytest.mark.parametrize(
    "point",
    [pytest.param("monday", marks=detail), "tuesday", pytest.param("wednesday", marks=detail)],
)
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


# --- in place --------------------------------------------------------------------------------


@pytest.fixture(name="tracked")
def tracked_fixture(make_vm: MakeMachine, tmp_path: Path) -> Backups:
    """monday <- tuesday <- wednesday, of two qcow2 disks; something was written since; shut off."""
    disks = [DiskSpec("vda"), DiskSpec("vdb", size=8 * MIB + 512, cluster_size=4096)]
    backups = Backups(make_vm(disks, state="running"), tmp_path)
    for seed, name in enumerate(("monday", "tuesday", "wednesday")):
        scribble(backups.machine, seed)
        backups.take(name)
    scribble(backups.machine, 3)
    backups.held["now"] = {
        disk.target: backups.machine.contents(disk.target) for disk in backups.machine.disks
    }
    backups.machine.stop()
    return backups


def small_and_right(backups: Backups, name: str, parent: str, most: int = 6 * BLOCK) -> None:
    """The next backup is an increment, of what was written and no more, and holds what is there."""
    machine = backups.machine
    if not machine.active:
        machine.start()
    for disk in machine.disks:
        machine.write(disk.target, 1 * MIB, 4096, 0x77)
    made = backups.take(name)
    assert made.parent == parent
    assert [(disk.mode, disk.base, disk.reason) for disk in made.disks] == [
        ("incremental", parent, None)
    ] * len(machine.disks)
    assert all(disk.bytes <= most for disk in made.disks), made.disks
    backups.check(made)


def changed(backups: Backups, start: str, end: str | None = None) -> dict[str, int | None]:
    """Bytes that changed, by disk; None: unknown."""
    with backups.domain() as domain:
        return {
            disk.name: disk.dirty_bytes if disk.known else None
            for disk in domain.diff(start, end).disks
        }


def assert_consistent(backups: Backups) -> None:
    with backups.domain() as domain:
        assert [each for each in domain.check() if not each.harmless] == []


@pytest.mark.parametrize("point", ["monday", pytest.param("wednesday", marks=detail)])
def test_a_domain_goes_back_to_a_point_and_its_history_goes_on(
    tracked: Backups, point: str
) -> None:
    machine = tracked.machine
    modes = {path: path.stat().st_mode for path in machine.images.values()}
    with tracked.domain() as domain:
        done = domain.restore(tracked.repository, point)
        restored = domain.current()
    assert restored is not None
    assert restored.parent == point
    assert [disk.file for disk in done.disks] == [str(path) for path in machine.images.values()]
    for target, path in machine.images.items():
        assert machine.contents(target) == tracked.held[point][target]
        assert path.stat().st_mode == modes[path]
        assert list(machine.bitmaps(target)) == [restored.name]
        assert sorted(each.name for each in path.parent.iterdir()) == ["vda.qcow2", "vdb.qcow2"]
    assert changed(tracked, point, restored.name) == {"vda": 0, "vdb": 0}
    assert_consistent(tracked)
    small_and_right(tracked, "thursday", point)
    assert_consistent(tracked)


def test_the_line_that_was_left_stays_in_the_tree_with_what_is_known_of_it(
    tracked: Backups,
) -> None:
    before = changed(tracked, "monday", "wednesday")
    with tracked.domain() as domain:
        domain.restore(tracked.repository, "monday")
        tails = domain._session.store.load().record.tails
    assert changed(tracked, "monday", "wednesday") == before
    assert set(tails) == {"wednesday"}
    assert all(tails["wednesday"][target] for target in ("vda", "vdb"))
    # And forth again: the way to the other branch is known, so the next backup is small.
    tracked.machine.start()
    tracked.machine.stop()
    with tracked.domain() as domain:
        domain.restore(tracked.repository, "wednesday")
    for target in ("vda", "vdb"):
        assert tracked.machine.contents(target) == tracked.held["wednesday"][target]
    small_and_right(tracked, "thursday", "wednesday")


@pytest.mark.each_release
def test_one_disk_is_restored_and_the_others_go_on(tracked: Backups) -> None:
    machine = tracked.machine
    with tracked.domain() as domain:
        domain.restore(tracked.repository, "monday", disks=["vda"])
        restored = domain.current()
    assert restored is not None
    assert restored.parent == "wednesday"
    assert machine.contents("vda") == tracked.held["monday"]["vda"]
    assert machine.contents("vdb") == tracked.held["now"]["vdb"]
    assert list(machine.bitmaps("vda")) == [restored.name]
    since = changed(tracked, "wednesday", restored.name)
    assert since["vda"]
    assert since["vdb"]
    assert_consistent(tracked)
    machine.start()
    made = tracked.take("thursday")
    tracked.check(made)
    assert [(disk.mode, disk.reason) for disk in made.disks] == [("incremental", None)] * 2
    # All that differs between two points is in what is said to have changed between them.
    for earlier in ("monday", "tuesday", "wednesday"):
        with tracked.domain() as domain:
            for disk in domain.diff(earlier, "thursday").disks:
                one, other = tracked.held[earlier][disk.name], tracked.held["thursday"][disk.name]
                assert disk.map is not None
                covered = bytearray(len(one))
                for start, length in disk.extents():
                    covered[start : start + length] = b"\1" * length
                assert all(
                    covered[at]
                    for at in range(0, len(one), 512)
                    if one[at : at + 512] != other[at : at + 512]
                )


def test_a_point_of_which_the_history_knows_nothing_begins_a_new_root(tracked: Backups) -> None:
    with tracked.domain() as domain:
        domain.delete("tuesday")
        domain.restore(tracked.repository, "tuesday")
        restored = domain.current()
    assert restored is not None
    assert restored.parent is None
    for target in ("vda", "vdb"):
        assert tracked.machine.contents(target) == tracked.held["tuesday"][target]
    assert_consistent(tracked)
    small_and_right(tracked, "thursday", "tuesday")


# --- a new domain ----------------------------------------------------------------------------


@contextlib.contextmanager
def defined(
    backups: Backups, point: str, folder: Path, name: str, **options: Any
) -> Iterator[Backups]:
    """A domain that was made from a point, as a machine with backups of its own."""
    machine = backups.machine
    with ckptmgr.connect(machine.uri, store=backups.store) as host:
        done = host.restore(backups.repository, machine.name, point, folder, name=name, **options)
    assert done.domain is not None
    assert done.domain.name == name
    new = copy.copy(machine)
    new.name = name
    new.domain = machine.stand.handle.lookupByName(name)
    new.images = {disk.name: Path(disk.file) for disk in done.disks}
    new.writes = {disk.name: [] for disk in done.disks}
    new.disks = tuple(
        replace(disk, format=each.format)
        for disk in machine.disks
        for each in done.disks
        if each.name == disk.target
    )
    again = copy.copy(backups)
    again.machine = new
    lineage = backups.repository / machine.domain.UUIDString()
    again.image = (  # type: ignore[method-assign]
        lambda manifest, target: lineage / manifest.name / f"{target}.qcow2"
    )
    try:
        yield again
    finally:
        new.destroy()


@pytest.mark.each_release
@pytest.mark.parametrize("flatten", [False, pytest.param(True, marks=detail)])
def test_a_new_domain_runs_and_its_next_backup_is_small(
    tracked: Backups, tmp_path: Path, flatten: bool
) -> None:
    machine = tracked.machine
    machine.start()
    with defined(tracked, "tuesday", tmp_path / "new", "restored", flatten=flatten) as new:
        assert new.machine.domain.UUIDString() != machine.domain.UUIDString()
        with new.domain() as domain:
            found = domain.current()
            assert found is not None
            assert (found.name, found.parent) == ("tuesday", None)
        assert_consistent(new)
        for target in ("vda", "vdb"):
            assert new.machine.contents(target) == tracked.held["tuesday"][target]
        new.machine.start(paused=False)
        small_and_right(new, "restored-1", "tuesday")
        small_and_right(new, "restored-2", "restored-1")
        made = tracked.take("thursday")  # the first domain goes on beside it
        assert made.parent == "wednesday"
        points = ckptmgr.repository(tracked.repository).points("restored").points
        assert [(point.name, point.parent) for point in points] == [
            ("restored-1", "tuesday"),
            ("restored-2", "restored-1"),
        ]
        assert_consistent(new)


def test_a_new_domain_has_copies_of_what_it_is_made_of(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd.img"
    kernel.write_bytes(b"a kernel")
    initrd.write_bytes(b"an initrd")
    elements = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd>"
    backups = Backups(make_vm([DiskSpec("vda")], state="stopped", os_elements=elements), tmp_path)
    backups.take("monday")
    kernel.unlink()
    with defined(backups, "monday", tmp_path / "new", "restored") as new:
        text = new.machine.domain.XMLDesc()
        assert f"<kernel>{tmp_path}/new/kernel</kernel>" in text
        assert (tmp_path / "new/kernel").read_bytes() == b"a kernel"
        assert (tmp_path / "new/initrd").read_bytes() == b"an initrd"


@detail
def test_a_name_that_is_taken_is_refused_before_anything_is_copied(
    tracked: Backups, tmp_path: Path
) -> None:
    name = tracked.machine.name
    with ckptmgr.connect(tracked.machine.uri, store=tracked.store) as host:
        with pytest.raises(ckptmgr.InvalidRequest, match=f"there is a domain '{name}'"):
            host.restore(tracked.repository, name, "monday", tmp_path / "new", name=name)
        with pytest.raises(ckptmgr.CkptmgrError):
            host.restore(tracked.repository, name, "monday", tmp_path / "new", name=" ")
    assert not (tmp_path / "new").exists()


def test_a_domain_that_libvirt_refuses_leaves_nothing(tracked: Backups, tmp_path: Path) -> None:
    name = tracked.machine.name
    with (
        ckptmgr.connect(tracked.machine.uri, store=tracked.store) as host,
        pytest.raises(ckptmgr.CkptmgrError, match="too long"),
    ):
        # libvirt has a file of that name.
        long = "x" * 300
        host.restore(tracked.repository, name, "monday", tmp_path / "new", name=long, flatten=True)
    assert not (tmp_path / "new").exists()


@detail
def test_every_point_of_a_history_with_a_fork_comes_back(tracked: Backups, tmp_path: Path) -> None:
    machine = tracked.machine
    with tracked.domain() as domain:
        domain.restore(tracked.repository, "monday")
    machine.start()
    scribble(machine, 10)
    assert tracked.take("thursday").parent == "monday"
    scribble(machine, 11)
    assert tracked.take("friday").parent == "thursday"
    repository = ckptmgr.repository(tracked.repository)
    for point in ("monday", "tuesday", "wednesday", "thursday", "friday"):
        done = repository.restore(machine.name, point, tmp_path / point, flatten=True)
        for disk in done.disks:
            raw = tmp_path / "seen.raw"
            subprocess.run(
                ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.file, raw], check=True
            )
            assert raw.read_bytes() == held(tracked, point, disk.name), (point, disk.name)
    # From one branch to the other, and the next backup knows the way.
    machine.stop()
    with tracked.domain() as domain:
        domain.restore(tracked.repository, "wednesday")
    for target in ("vda", "vdb"):
        assert machine.contents(target) == tracked.held["wednesday"][target]
    small_and_right(tracked, "saturday", "wednesday")


def refused(backups: Backups, error: type[ckptmgr.CkptmgrError], says: str, **options: Any) -> None:
    """It is refused, and nothing is touched."""
    images = backups.machine.images
    before = [(path.stat().st_ino, backups.machine.contents(disk)) for disk, path in images.items()]
    with backups.domain() as domain:
        current = domain.current()
        with pytest.raises(error, match=says):
            domain.restore(backups.repository, "monday", **options)
        with pytest.raises(error, match=says):
            domain.plan_restore(backups.repository, "monday", **options)
        assert domain.current() == current
    after = [(path.stat().st_ino, backups.machine.contents(disk)) for disk, path in images.items()]
    assert after == before


def test_what_would_do_harm_in_place_is_refused(tracked: Backups) -> None:
    machine = tracked.machine
    refused(tracked, ckptmgr.InvalidRequest, "has no disk 'vdz'", disks=["vdz"])
    path = machine.images["vdb"]
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "-c", "sleep 600000", str(path)], stdin=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + patiently(60)
        while not is_being_written(str(path)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        refused(tracked, ckptmgr.Busy, "vdb is in use elsewhere")
    finally:
        holder.kill()
        holder.wait()
    machine.start()
    refused(tracked, ckptmgr.InvalidRequest, "is running")
    machine.domain.checkpointCreateXML(
        "<domaincheckpoint><name>mine</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    )
    machine.stop()
    refused(tracked, ckptmgr.Unsupported, "libvirt has a checkpoint 'mine' that is not ours")
    machine.start()
    machine.resume()
    machine.domain.managedSave()
    refused(tracked, ckptmgr.InvalidRequest, "has a saved state")


def test_snapshots_in_an_image_are_not_thrown_away(make_vm: MakeMachine, tmp_path: Path) -> None:
    backups = Backups(make_vm([DiskSpec("vda", size=4 * MIB)], state="running"), tmp_path)
    backups.take("monday")
    backups.machine.stop()
    path = backups.machine.images["vda"]
    subprocess.run(["qemu-img", "bitmap", "--remove", path, "monday"], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "s1", path], check=True)
    refused(backups, ckptmgr.Unsupported, "holds snapshots, which would be lost")


# --- interrupted, and used before it is settled ------------------------------------------------


@pytest.fixture(name="halfway")
def halfway_fixture(tracked: Backups, monkeypatch: pytest.MonkeyPatch) -> Backups:
    """vda has been replaced by what it held on monday, and vdb has not."""
    move = files.move

    def once(old: Path, new: Path) -> None:
        if new.name == "vdb.qcow2":
            raise KeyboardInterrupt
        move(old, new)

    with monkeypatch.context() as patch, tracked.domain() as domain:
        patch.setattr(files, "move", once)
        with pytest.raises(KeyboardInterrupt):
            domain.restore(tracked.repository, "monday")
    return tracked


@pytest.mark.each_release
def test_a_restore_that_was_interrupted_is_completed(halfway: Backups) -> None:
    assert changed(halfway, "monday") == {"vda": 0, "vdb": 0}
    for target in ("vda", "vdb"):
        assert halfway.machine.contents(target) == halfway.held["monday"][target]
    assert_consistent(halfway)
    small_and_right(halfway, "thursday", "monday")


@pytest.mark.parametrize("running", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_what_a_domain_wrote_before_it_was_settled_is_never_taken_for_unchanged(
    halfway: Backups, running: bool
) -> None:
    machine = halfway.machine
    machine.start()
    machine.write("vda", 2 * MIB, 65536, 0x21)
    machine.write("vdb", 3 * MIB, 65536, 0x22)
    if not running:
        machine.stop()
    with halfway.domain() as domain:
        diffs = {disk.name: disk for disk in domain.diff("monday").disks}
        found = domain.current()
    assert found is not None
    assert found.parent == "monday"
    for target, disk in diffs.items():
        now, before = machine.contents(target), halfway.held["monday"][target]
        told = bytearray(len(now))
        for start, length in disk.extents():
            told[start : start + length] = b"\1" * length
        for at in range(0, len(now), 512):
            assert now[at : at + 512] == before[at : at + 512] or told[at], (target, at)
    assert diffs["vda"].known
    assert diffs["vda"].dirty_bytes == 65536
    folder = machine.images["vda"].parent
    assert {path.name for path in folder.iterdir()} == {"vda.qcow2", "vdb.qcow2"}
    if not running:
        machine.start()
    made = halfway.take("thursday")
    halfway.check(made)
    machine.write("vdb", 1 * MIB, 4096, 0x23)
    made = halfway.take("friday")
    halfway.check(made)
    assert [(disk.mode, disk.reason) for disk in made.disks] == [("incremental", None)] * 2


@pytest.mark.not_on_stacks("what is mounted here is not mounted there")
def test_in_place_on_a_full_file_system_keeps_the_images(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=True)
    try:
        image = small / "vda.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"], check=True)
        backups = Backups(make_vm([DiskSpec("vda", size=4 * MIB, image=image)]), tmp_path)
        backups.machine.write("vda", 0, 3 * MIB, 0x11)
        backups.take("monday")
        backups.machine.stop()
        before = backups.machine.contents("vda")
        with backups.domain() as domain:
            with pytest.raises(ckptmgr.RestoreFailed, match="No space left"):
                domain.restore(backups.repository, "monday")
            found = domain.current()
        assert found is not None
        assert found.name == "monday"
        assert backups.machine.contents("vda") == before
        assert [path.name for path in small.iterdir()] == ["vda.qcow2"]
        assert_consistent(backups)
        backups.machine.destroy()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
