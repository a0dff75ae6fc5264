"""A revert makes a branch of the history, and no byte that differs is left out of it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

from ckptmgr.errors import CheckpointExists
from integration.branch_model import Branches
from integration.evidence import bitmaps
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Guest, Machine, Stand
from integration.stand.patience import patiently

from .scene import DISKS, SNAPSHOTS, MakeBranches, bring, goes_on, may_load, releases_if_long, sound

pytestmark = SNAPSHOTS


@dataclass(frozen=True)
class Run:
    """States: at the snapshot, before the revert, what was asked for, and afterwards."""

    then: str
    before: str
    asked: bool | None
    after: str


RUNS = (
    pytest.param(Run("running", "running", None, "running"), id="running-running"),
    pytest.param(
        Run("running", "paused", False, "paused"), id="running-paused", marks=releases_if_long
    ),
    pytest.param(
        Run("running", "stopped", None, "running"), id="running-stopped", marks=releases_if_long
    ),
    pytest.param(
        Run("paused", "running", None, "paused"), id="paused-running", marks=releases_if_long
    ),
    pytest.param(Run("paused", "stopped", True, "running"), id="paused-stopped"),
)


@pytest.mark.parametrize("run", RUNS)
def test_a_revert_makes_a_branch_and_leaves_the_machine_in_the_right_state(
    make: MakeBranches, run: Run
) -> None:
    scene = make(state=run.then)
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    assert scene.state() == run.then
    scene.scatter(2)
    scene.create("c2")
    scene.scatter(3)
    bring(scene.machine, run.before)
    made = scene.revert("s1", run=run.asked)
    assert scene.state() == run.after
    assert made.parent == "c1"
    scene.scatter(4)
    sound(scene)
    scene.create("c3")
    scene.scatter(5)
    sound(scene)
    assert {disk.state.value for disk in made.disks} == {"recording"}


def test_two_reverts_to_the_same_snapshot(scene: Branches) -> None:
    first = scene.revert("s1")
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    second = scene.revert("s1")
    assert first.parent == second.parent == "c1"
    scene.scatter(8)
    sound(scene)
    third = scene.revert("s1")  # with nothing but the checkpoint of the revert in between
    assert third.parent == "c1"
    sound(scene)


def test_back_to_an_older_and_then_to_a_younger_snapshot(scene: Branches) -> None:
    scene.revert("s1")
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    younger = scene.revert("s2")
    assert younger.parent == "c2"
    scene.scatter(8)
    scene.create("c4")
    sound(scene)


def test_snapshots_of_several_branches(scene: Branches) -> None:
    first = scene.revert("s1")
    scene.scatter(6)
    scene.snapshot("s3", checkpoint=True)
    scene.scatter(7)
    scene.create("c4")
    scene.revert("s2")
    scene.scatter(8)
    third = scene.revert("s3")
    assert scene.points[str(third.parent)].parent == first.name
    scene.scatter(9)
    sound(scene)


def test_a_snapshot_older_than_the_first_checkpoint(make: MakeBranches) -> None:
    scene = make()
    scene.scatter(1)
    scene.snapshot("s0")
    scene.scatter(2)
    scene.create("c1")
    scene.scatter(3)
    scene.create("c2")
    scene.scatter(4)
    made = scene.revert("s0")
    assert made.parent is None
    scene.scatter(5)
    scene.create("c3")
    scene.scatter(6)
    sound(scene)
    (vda, _) = scene.domain.diff("c2", "c3").disks
    assert not vda.known
    assert vda.reason


def test_a_checkpoint_of_the_same_instant(make: MakeBranches) -> None:
    scene = make(state="running")
    scene.create("c1")
    scene.scatter(1)
    taken = scene.snapshot("s1", checkpoint=True)
    assert scene.state() == "running"
    assert taken.checkpoint not in (None, "c1")
    scene.scatter(2)
    made = scene.revert("s1")
    assert made.parent == taken.checkpoint
    assert scene.state() == "running"
    assert scene.points[made.name].held == scene.points[str(made.parent)].held
    scene.scatter(3)
    sound(scene)


@releases_if_long
@pytest.mark.parametrize(
    "gone",
    [
        ("c1", "c2"),
        *(
            pytest.param(names, marks=pytest.mark.thorough)
            for names in (("c1",), ("c2",), ("c2", "c1"), ("r",))
        ),
    ],
    ids=str,
)
def test_a_deleted_checkpoint_that_a_snapshot_names(scene: Branches, gone: tuple[str, ...]) -> None:
    scene.create("c3")
    made = scene.revert("s2")
    scene.scatter(6)
    scene.create("c4")
    scene.scatter(7)
    for name in (made.name if each == "r" else each for each in gone):
        scene.domain.delete(name)
        scene.deleted(name)
        sound(scene)
    for snapshot in ("s1", "s2"):
        scene.revert(snapshot)
        scene.scatter(8)
        sound(scene)


@releases_if_long
def test_a_name_is_used_again_while_a_snapshot_has_it(scene: Branches) -> None:
    """s2 is of the first c2, not of the second."""
    scene.domain.delete("c2")
    scene.deleted("c2")
    scene.scatter(6)
    try:
        scene.create("c2")
    except CheckpointExists:
        scene.create("c3")
    scene.scatter(7)
    scene.revert("s2")
    scene.scatter(8)
    sound(scene)


@releases_if_long
def test_everything_is_deleted_and_then_reverted(scene: Branches) -> None:
    for name in ("c2", "c1"):
        scene.domain.delete(name)
        scene.deleted(name)
    assert bitmaps(scene.machine) == set()
    made = scene.revert("s2")
    assert made.parent is None
    scene.scatter(6)
    scene.create("c3")
    sound(scene)


@releases_if_long
def test_archived_bitmaps_are_no_loss_to_a_revert(scene: Branches) -> None:
    scene.domain.archive(keep=1)
    scene.recording = {"c2"}
    made = scene.revert("s1")
    scene.scatter(6)
    sound(scene)
    scene.revert("s2")
    scene.scatter(7)
    scene.domain.archive(keep=1)
    scene.recording = {str(scene.at)}
    assert made.name in scene.points
    sound(scene)


def test_a_snapshot_of_a_machine_that_had_other_disks(
    make: MakeBranches, tmp_path: Path, cell: Cell
) -> None:
    """A disk came after the snapshot, and another one went."""
    scene = make((*DISKS, DiskSpec("sda", size=2 * MIB)))
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.scatter(2)
    machine = scene.machine
    new = tmp_path / "new.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(new), "3M"], check=True)
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    machine.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{new}'/>"
        "<target dev='sdb' bus='scsi'/></disk>",
        flags,
    )
    gone = str(machine.images["sda"])
    machine.domain.detachDeviceFlags(
        f"<disk type='file' device='disk'><source file='{gone}'/>"
        "<target dev='sda' bus='scsi'/></disk>",
        flags,
    )
    deadline = time.monotonic() + patiently(30)
    while gone in machine.domain.XMLDesc():
        assert time.monotonic() < deadline, "the disk is not unplugged"
        time.sleep(0.05)
    kept = scene.targets
    scene.targets = ("vda", "vdb")
    made = scene.domain.create("c2")
    scene.made("c2")
    assert {disk.name for disk in made.disks} == {"vda", "vdb", "sdb"}
    scene.scatter(3)
    scene.targets = kept
    may_load(scene, "s1", cell)
    reverted = scene.revert("s1")
    assert {disk.name for disk in reverted.disks} == {"vda", "vdb", "sda"}
    scene.scatter(4)
    scene.create("c3")
    scene.check("c1", "c3")
    scene.check(reverted.name, "c3")
    scene.check("c3", None)
    assert not [each for each in scene.domain.check() if not each.harmless]


@releases_if_long
def test_a_revert_when_the_record_was_lost_before(scene: Branches) -> None:
    """QEMU was killed: what it wrote lately is unknown, and so is what depends on it."""
    scene.machine.kill()
    scene.machine.start()
    scene.crashed()
    scene.scatter(6)
    scene.revert("s1")  # which the crash took nothing from: c1's line goes on at c2
    scene.scatter(7)
    sound(scene)
    scene.revert("s2")  # after c2, where it did
    scene.scatter(8)
    sound(scene)
    goes_on(scene, "later", 9)


def _in_snapshot(image: Path, name: str, to: Path) -> bytes:
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-l", f"snapshot.name={name}"]
    subprocess.run([*command, "-O", "raw", str(image), str(to)], check=True)
    return to.read_bytes()


def _writes_on(machine: Machine) -> None:
    """Wait until the guest has gone on for a while to write where it was."""
    first = machine.domain.blockStats("vda")[2]
    deadline = time.monotonic() + patiently(60)
    while machine.domain.blockStats("vda")[2] < first + 5:
        assert time.monotonic() < deadline, "the guest does not go on"
        time.sleep(0.1)


@pytest.mark.thorough("monitor")
def test_not_one_write_of_a_running_guest_escapes(
    stand: Stand, engine: str, tmp_path: Path
) -> None:
    with Guest(stand, (DiskSpec("vda", size=16 * MIB),)) as guest:
        scene = Branches(guest.machine, tmp_path / "store", engine)
        domain, machine = scene.domain, guest.machine
        domain.create("c1")
        guest.shell.churn("vda", 4096, 4000)  # more than it gets to, however late we look
        guest.shell.wait_churned(10)
        domain.create_snapshot("s1", checkpoint=True)
        guest.shell.wait_churned(guest.shell.churned[-1] + 10)
        left = domain.checkpoints().current
        assert left is not None
        for _ in range(2):
            made = domain.revert_snapshot("s1")
            assert made.parent == left
            assert machine.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            _writes_on(machine)
            machine.domain.suspend()
            then = _in_snapshot(machine.images["vda"], "s1", tmp_path / "then")
            now = machine.contents("vda")
            (vda,) = domain.diff(made.name).disks
            assert vda.known
            changed = {
                granule
                for granule in range(16 * MIB // 65536)
                if then[granule * 65536 :][:65536] != now[granule * 65536 :][:65536]
            }
            shown = {
                granule
                for start, length in vda.extents()
                for granule in range(start // 65536, (start + length) // 65536)
            }
            assert changed
            assert changed <= shown
            assert len(shown - changed) <= 1  # one may have been written with what it had
            machine.resume()
