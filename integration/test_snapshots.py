"""Snapshots and reverts: each revert makes a branch, and no byte that differs is ever left out.

Whoever reverts, and whatever else was done to the images meanwhile, is followed by a model
(`Branches`) that has every byte of every checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

from ckptmgr.errors import (
    Busy,
    CheckpointExists,
    CkptmgrError,
    InvalidRequest,
    NoSnapshot,
    OperationFailed,
    Unsupported,
)
from integration import block_jobs
from integration.branch_model import Branches
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, known, unchanged
from integration.kill import END, Task, Warm
from integration.stacks.table import Cell
from integration.stand import (
    MIB,
    Daemon,
    DiskSpec,
    Guest,
    Machine,
    Stand,
    Workspace,
    await_greeting,
)

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=4 * MIB, backing=("qcow2",)))

MakeBranches = Callable[..., Branches]

pytestmark = [
    pytest.mark.once,
    pytest.mark.releases(("debian11", "monitor"), ("debian13", "libvirt")),
]

own = pytest.mark.releases()
"""On the other releases with --long alone: what it shows does not depend on them, or is a part of
what the random histories do there.
"""


@pytest.fixture
def make(make_vm_on: MakeMachine, stand: Stand, engine: str, tmp_path: Path) -> MakeBranches:
    """``make(disks, **options)``: a machine and its model."""

    def make(disks: tuple[DiskSpec, ...] = DISKS, **options: object) -> Branches:
        return Branches(make_vm_on(stand, disks, **options), tmp_path / "store", engine)

    return make


@pytest.fixture
def scene(make: MakeBranches) -> Branches:
    """c1, snapshot s1, c2, snapshot s2, with writes before, between and after."""
    scene = make()
    scene.scatter(1)
    scene.create("c1")
    scene.scatter(2)
    scene.snapshot("s1")
    scene.scatter(3)
    scene.create("c2")
    scene.scatter(4)
    scene.snapshot("s2")
    scene.scatter(5)
    return scene


def sound(scene: Branches) -> None:
    """Everything there is to be seen."""
    scene.require_tree()
    scene.check_all()
    found = [each for each in scene.domain.check() if not each.harmless]
    assert not found, [each.message for each in found]
    if scene.machine.active and scene.engine == "libvirt":
        # what libvirt leaves behind where a block job's merge of bitmaps failed
        shown = {name for _, name in bitmaps(scene.machine)} - {"libvirt-tmp-activewrite"}
        assert set(known(scene.machine)) == shown


def repaired(scene: Branches) -> None:
    """After others have been at work: whatever they did is curable, and nothing is left out."""
    scene.check_all()
    scene.domain.repair()
    sound(scene)


def goes_on(scene: Branches, name: str, number: int) -> None:
    """The next checkpoint is exact again."""
    scene.create(f"{name}-a")
    scene.scatter(number)
    scene.create(f"{name}-b")
    assert scene.between(f"{name}-a", f"{name}-b")[1] is False
    scene.scatter(number + 1)
    sound(scene)


def in_place(scene: Branches) -> bool:
    """Whether libvirt loads a snapshot into the QEMU that runs (before 8.0)."""
    return bool(scene.machine.stand.handle.getLibVersion() < 8_000_000)


def unnamed(scene: Branches, message: str) -> str:
    """An error's message, which is the same for every domain."""
    return message.replace(f"domain {scene.machine.name!r}", "the domain")


def may_load(scene: Branches, name: str, cell: Cell) -> None:
    """The machine has other images than at the snapshot: where libvirt would load it into the QEMU
    that has them, this is refused until the machine is stopped.
    """
    if in_place(scene):
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported) as caught:
            scene.domain.revert_snapshot(name)
        assert "stop the domain" in str(caught.value.hint)
        cell.refused(f"to revert to when a domain that runs had other images: {caught.value.hint}")
        scene.machine.stop()


# --- our own reverts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """States: at the snapshot, before the revert, what was asked for, and afterwards."""

    then: str
    before: str
    asked: bool | None
    after: str


RUNS = (
    pytest.param(Run("running", "running", None, "running"), id="running-running"),
    pytest.param(Run("running", "paused", False, "paused"), id="running-paused", marks=own),
    pytest.param(Run("running", "stopped", None, "running"), id="running-stopped", marks=own),
    pytest.param(Run("paused", "running", None, "paused"), id="paused-running", marks=own),
    pytest.param(Run("paused", "stopped", True, "running"), id="paused-stopped"),
)


def _bring(machine: Machine, state: str) -> None:
    if machine.active and state == "stopped":
        machine.stop()
    if not machine.active and state != "stopped":
        machine.start()
    if state == "running":
        with contextlib.suppress(libvirt.libvirtError):  # it runs already
            machine.resume()
    elif state == "paused" and machine.domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
        machine.domain.suspend()


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
    _bring(scene.machine, run.before)
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


@own
@pytest.mark.parametrize("gone", [("c1",), ("c2",), ("c1", "c2"), ("c2", "c1"), ("r",)], ids=str)
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


@own
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


@own
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


@own
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
    deadline = time.monotonic() + 30
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


@own
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


def test_what_cannot_be_reverted_is_refused_before_the_machine_is_touched(
    scene: Branches,
) -> None:
    machine = scene.machine
    with unchanged(machine, scene.store), pytest.raises(NoSnapshot):
        scene.domain.revert_snapshot("s9")
    machine.qmp(
        "block-dirty-bitmap-add", node=machine.node("vdb"), name="somebody", persistent=True
    )
    pid = machine.pid
    with unchanged(machine, scene.store), pytest.raises(Unsupported) as caught:
        scene.domain.revert_snapshot("s1")
    assert "somebody" in str(caught.value)
    assert machine.pid == pid
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vdb"), name="somebody")
    scene.revert("s1")
    scene.scatter(6)
    sound(scene)


def test_a_snapshot_of_a_stopped_machine(scene: Branches, cell: Cell) -> None:
    machine = scene.machine
    machine.stop()
    try:
        scene.domain.create_snapshot("off")
    except (Unsupported, OperationFailed) as error:
        # libvirt up to 9.0 refuses it where there are checkpoints; then nothing has changed
        assert "checkpoint" in str(error)
        cell.refused(unnamed(scene, f"a snapshot of a domain that is off: {error}"))
        sound(scene)
        return
    scene.taken("off")
    scene.scatter(6)
    machine.start()
    scene.scatter(7)
    scene.revert("off")
    assert scene.state() == "stopped"
    scene.scatter(8)
    machine.start()
    scene.scatter(9)
    goes_on(scene, "later", 10)


@own
def test_snapshots_are_listed_and_deleted(scene: Branches) -> None:
    listed = {each.name: each for each in scene.domain.snapshots()}
    assert {name: each.checkpoint for name, each in listed.items()} == {"s1": "c1", "s2": "c2"}
    assert listed["s2"].current
    assert listed["s2"].parent == "s1"
    assert scene.domain.delete_snapshot("s1") == ("s1",)
    assert [each.name for each in scene.domain.snapshots()] == ["s2"]
    with pytest.raises(NoSnapshot):
        scene.domain.delete_snapshot("s1")
    scene.revert("s2")
    scene.scatter(6)
    sound(scene)


def _external(scene: Branches, name: str, *, memory: bool, checkpoint: bool = False) -> None:
    """Take an external snapshot."""
    file = str(scene.machine.folder / f"{name}.memory") if memory else None
    scene.snapshot(name, checkpoint=checkpoint, disk_only=not memory, memory=file)
    scene.find()
    assert file is None or Path(file).stat().st_size > 0


@pytest.mark.parametrize("memory", [False, True], ids=["disks", "with memory"])
def test_external_snapshots(make: MakeBranches, memory: bool, cell: Cell) -> None:
    scene = make(state="running")
    scene.create("c1")
    scene.scatter(1)
    _external(scene, "e1", memory=memory)
    assert scene.state() == "running"
    scene.scatter(2)
    scene.create("c2")
    scene.scatter(3)
    _external(scene, "e2", memory=memory, checkpoint=True)
    assert scene.state() == "running"
    scene.scatter(4)
    sound(scene)
    if not externals_revert(scene):
        with (
            unchanged(scene.machine, scene.store),
            pytest.raises(Unsupported, match="external") as no,
        ):
            scene.domain.revert_snapshot("e1")
        cell.refused(unnamed(scene, no.value.message))
        goes_on(scene, "later", 5)
        return
    for number, name in enumerate(("e2", "e1", "e1"), 5):
        made = scene.revert(name, run=True)
        assert scene.state() == "running"
        assert scene.between(str(made.parent), made.name)[1] is False
        scene.scatter(number)
        sound(scene)
    goes_on(scene, "later", 8)


def externals_revert(scene: Branches) -> bool:
    """Whether this libvirt reverts to external snapshots: 9.9 and later do."""
    return bool(scene.machine.stand.handle.getLibVersion() >= 9_009_000)


@own
def test_a_file_for_the_memory_is_not_written_over(make: MakeBranches, tmp_path: Path) -> None:
    scene = make()
    there = tmp_path / "there"
    there.write_text("something")
    with unchanged(scene.machine, scene.store):
        for options in ({}, {"disk_only": True}):
            with pytest.raises(InvalidRequest):
                scene.domain.create_snapshot("s1", memory=str(there), **options)
    assert there.read_text() == "something"
    scene.machine.stop()
    with pytest.raises(InvalidRequest, match="does not run"):
        scene.domain.create_snapshot("s1", memory=str(tmp_path / "new"))


# --- a revert that fails ---------------------------------------------------------------------


def _forget_internally(image: Path, name: str) -> None:
    subprocess.run(["qemu-img", "snapshot", "-d", name, str(image)], check=True)


@own
@pytest.mark.parametrize("before", ["running", "stopped"])
@pytest.mark.parametrize("target", ["vda", "vdb"])
def test_a_revert_that_libvirt_refuses_leaves_the_present_line_going_on(
    scene: Branches, target: str, before: str
) -> None:
    """One of the images has not got the snapshot any more."""
    machine = scene.machine
    machine.stop()
    _forget_internally(machine.images[target], "s1")
    _bring(machine, before)
    with pytest.raises(CkptmgrError):
        scene.domain.revert_snapshot("s1")
    listed = scene.domain.checkpoints()
    assert listed.current is not None
    if listed.current != "c2":
        # made where the machine is now, if that could be told
        scene.look()
        scene.loose = True
        scene.made(listed.current)
        assert listed.checkpoints
    scene.scatter(6)
    scene.check_all()
    if not machine.active:
        machine.start()
    goes_on(scene, "later", 8)


# --- others revert ---------------------------------------------------------------------------


def libvirts_own(scene: Branches, name: str) -> str:
    """``virsh snapshot-revert``; returns the error."""
    domain = scene.machine.domain
    try:
        domain.revertToSnapshot(domain.snapshotLookupByName(name), 0)
    except libvirt.libvirtError as error:
        return str(error)
    finally:
        scene.start()
        scene.others_reverted()
    return ""


def disks_stay(scene: Branches) -> bool:
    """Whether such a revert may be refused with the disks and bitmaps as they were: on 7.0 by the
    QEMU that runs, on 11.3 by one that is ended after that.
    """
    return scene.machine.stand.kind in ("debian11", "debian13")


@pytest.mark.parametrize(
    "first", ["create", *(pytest.param(each, marks=own) for each in ("diff", "repair", "check"))]
)
def test_a_revert_behind_our_back(
    scene: Branches, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert libvirts_own(scene, "s1")  # of the bitmaps; libvirt is not always told so in time
    stayed = scene.at == "c2"
    assert disks_stay(scene) or not stayed
    scene.scatter(6)
    with caplog.at_level(logging.WARNING, "ckptmgr"):
        if first == "diff":
            scene.check("c2", None)
            assert ("went back" in caplog.text) == (not stayed)
        elif first == "create":
            scene.create("first")
            assert ("went back" in caplog.text) == (not stayed)
        elif first == "repair":
            scene.domain.repair()
        else:
            assert scene.domain.check()
    scene.check_all()
    repaired(scene)
    assert scene.at == ("first" if first == "create" else "c2" if stayed else "c1")
    goes_on(scene, "later", 7)
    scene.revert("s2")
    scene.scatter(9)
    sound(scene)


@pytest.mark.releases(("debian13", "libvirt"))
def test_a_revert_behind_our_back_from_an_overlay(scene: Branches) -> None:
    """Also where it is refused, and leaves the domain with the images below the overlays."""
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(6)
    libvirts_own(scene, "s1")
    scene.scatter(7)
    scene.check_all()
    repaired(scene)
    goes_on(scene, "later", 8)


@own
def test_reverts_behind_our_back_one_after_the_other(scene: Branches) -> None:
    libvirts_own(scene, "s1")
    scene.scatter(6)
    libvirts_own(scene, "s2")
    scene.scatter(7)
    libvirts_own(scene, "s1")
    scene.scatter(8)
    repaired(scene)
    goes_on(scene, "later", 9)


@own
def test_a_revert_behind_our_back_to_a_time_without_checkpoints(make: MakeBranches) -> None:
    scene = make()
    scene.snapshot("s0")
    scene.scatter(1)
    scene.create("c1")
    scene.scatter(2)
    libvirts_own(scene, "s0")
    stayed = scene.at == "c1"
    assert disks_stay(scene) or not stayed
    scene.scatter(3)
    scene.create("c2")
    assert scene.points["c2"].parent == ("c1" if stayed else None)
    scene.scatter(4)
    repaired(scene)


def test_a_revert_behind_our_back_without_bitmaps_that_succeeds(scene: Branches) -> None:
    """Somebody took the bitmaps out first, as advice on the web has it."""
    machine = scene.machine
    for image, name in sorted(bitmaps(machine)):
        target = next(t for t, path in machine.images.items() if path.name == image)
        machine.qmp("block-dirty-bitmap-remove", node=machine.node(target), name=name)
    assert libvirts_own(scene, "s1") == ""
    assert {t: bytes(held) for t, held in scene.now.items()} == scene.snapshots["s1"].held
    scene.scatter(6)
    repaired(scene)
    goes_on(scene, "later", 7)


def test_the_domain_is_defined_anew_from_old_xml(scene: Branches) -> None:
    """The disks did not go back: everything stays exact."""
    machine = scene.machine
    old = next(
        each.getXMLDesc(0).partition("<domain ")[2].partition("</domain>")[0]
        for each in machine.domain.listAllSnapshots()
        if each.getName() == "s1"
    )
    machine.stop()
    machine.stand.handle.defineXML(f"<domain {old}</domain>")
    assert scene.marked() == "c1"
    machine.start()
    scene.find()
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    scene.check_all()
    sound(scene)


# --- storage goes back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """What a copy of the storage has: the images, and the XML."""

    folder: Path
    xml: str
    held: dict[str, bytes]
    at: str | None
    recording: frozenset[str]

    @classmethod
    def take(cls, scene: Branches, folder: Path) -> Copies:
        """Of a stopped machine."""
        folder.mkdir()
        for image in scene.machine.images.values():
            shutil.copy(image, folder / image.name)
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE
        held = {target: bytes(each) for target, each in scene.now.items()}
        return cls(
            folder,
            scene.machine.domain.XMLDesc(flags),
            held,
            scene.at,
            frozenset(scene.recording),
        )

    def put_back(self, scene: Branches, *, xml: bool, only: str = "") -> None:
        for target, image in scene.machine.images.items():
            if only in ("", target):
                shutil.copy(self.folder / image.name, image)
        if xml:
            scene.machine.stand.handle.defineXML(self.xml)


@pytest.fixture
def copied(make: MakeBranches, tmp_path: Path) -> Iterator[tuple[Branches, Copies]]:
    """c1, a copy of the storage, c2, each with writes after it; stopped."""
    scene = make()
    scene.create("c1")
    scene.scatter(1)
    scene.machine.stop()
    copies = Copies.take(scene, tmp_path / "copies")
    scene.scatter(2)
    scene.create("c2")
    scene.scatter(3)
    yield scene, copies


@pytest.mark.parametrize(
    "xml", [pytest.param(True, id="with its XML"), pytest.param(False, id="alone", marks=own)]
)
@pytest.mark.parametrize(
    "only", [pytest.param("", id="all disks"), pytest.param("vda", id="one disk", marks=own)]
)
def test_storage_goes_back(copied: tuple[Branches, Copies], xml: bool, only: str) -> None:
    scene, copies = copied
    copies.put_back(scene, xml=xml, only=only)
    scene.moved() if xml else scene.crashed()
    scene.machine.start()
    scene.scatter(6)
    scene.check_all()
    if not (xml or only) and scene.engine == "monitor":
        # whoever may look sees that the images have c1's bitmaps, and nothing of c2
        assert "rolled-back" in [each.code for each in scene.domain.repair()]
        scene.went_back_to("c1")
    repaired(scene)
    goes_on(scene, "later", 7)


@own
def test_storage_goes_back_and_forth(copied: tuple[Branches, Copies], tmp_path: Path) -> None:
    scene, copies = copied
    younger = Copies.take(scene, tmp_path / "younger")
    copies.put_back(scene, xml=True)
    scene.moved()
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    scene.check_all()
    younger.put_back(scene, xml=True)
    scene.moved()
    scene.scatter(8)
    scene.check_all()
    scene.create("c4")
    scene.scatter(9)
    scene.check_all()
    copies.put_back(scene, xml=True)
    scene.moved()
    scene.scatter(10)
    scene.machine.start()
    scene.check_all()
    repaired(scene)
    goes_on(scene, "later", 11)


@own
def test_storage_goes_back_to_when_another_checkpoint_had_the_name(
    copied: tuple[Branches, Copies], tmp_path: Path
) -> None:
    scene, _ = copied
    copies = Copies.take(scene, tmp_path / "younger")
    scene.scatter(4)
    scene.domain.delete("c2")
    scene.deleted("c2")
    scene.create("c2")
    scene.scatter(5)
    copies.put_back(scene, xml=True)
    scene.moved()
    scene.scatter(6)
    scene.check_all()
    repaired(scene)


# --- others' block jobs ----------------------------------------------------------------------

JOBS: dict[str, Callable[[Machine, str], object]] = {
    "commit": block_jobs.commit,
    "pull": block_jobs.pull,
    "copy": block_jobs.copy,
}


def after_job(scene: Branches, job: str, *, resized: bool = False) -> None:
    """A block job is done.  libvirt 7.0 knows nothing of bitmaps, and takes none to a copy; the
    others lose some when the disk was resized.
    """
    scene.find()
    gone = not scene.recorded()
    assert resized or gone == (job == "copy" and scene.machine.stand.kind == "debian11")
    if gone or resized:
        scene.lose()


@pytest.mark.parametrize(
    "resized", [pytest.param(False, id=""), pytest.param(True, id="after a resize", marks=own)]
)
@pytest.mark.parametrize("job", JOBS)
def test_an_external_snapshot_and_a_block_job_of_others(
    scene: Branches, job: str, resized: bool, cell: Cell
) -> None:
    machine = scene.machine
    block_jobs.overlay(machine)
    scene.find()
    scene.scatter(6)
    scene.check_all()
    scene.create("c3")
    scene.scatter(7)
    scene.loose = True  # a job copies, and where it copies to is marked
    if resized:
        machine.domain.blockResize("vda", 6 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        scene.now["vda"].extend(bytes(2 * MIB - 1536))
        scene.write("vda", 5 * MIB, 70_000)
        scene.lose()
    JOBS[job](machine, "vda")
    after_job(scene, job, resized=resized)
    scene.scatter(8)
    scene.check_all()
    repaired(scene)
    goes_on(scene, "later", 9)
    if job != "commit" and not resized:
        # the snapshots are in images that have left the chain
        may_load(scene, "s1", cell)
        scene.revert("s1")
        scene.scatter(11)
        sound(scene)


def test_fact_23_changes_are_not_called_clean(make: MakeBranches) -> None:
    """Snapshot, resize, blockpull: libvirt's increment is all clean then."""
    scene = make((DiskSpec("vda", size=4 * MIB),))
    scene.create("c1")
    scene.write("vda", 0, 2 * MIB)
    block_jobs.overlay(scene.machine)
    scene.find()
    machine = scene.machine
    machine.domain.blockResize("vda", 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    scene.now["vda"].extend(bytes(4 * MIB))
    block_jobs.pull(machine, "vda")
    scene.lose()
    scene.check_all()
    scene.snapshot("s1")
    scene.write("vda", 7 * MIB, 65536)
    made = scene.revert("s1")
    scene.check_all()
    scene.write("vda", 6 * MIB, 65536)
    scene.check("c1", made.name)
    scene.check(made.name, None)
    repaired(scene)


@own
def test_the_disk_grows_before_a_snapshot(make: MakeBranches) -> None:
    """What came to the disk is a part of what changed since."""
    scene = make((DiskSpec("vda", size=4 * MIB),))
    scene.create("c1")
    scene.write("vda", 0, 65536)
    machine = scene.machine
    machine.domain.blockResize("vda", 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    scene.now["vda"].extend(bytes(4 * MIB))
    scene.loose = True
    scene.snapshot("s1")
    scene.write("vda", 5 * MIB, 65536)
    made = scene.revert("s1")
    scene.check("c1", made.name)
    scene.check_all()


@own
def test_a_revert_from_an_overlay_to_a_snapshot_in_its_base(scene: Branches, cell: Cell) -> None:
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)
    goes_on(scene, "later", 9)


@own
def test_a_snapshot_whose_base_was_written_since_is_refused(scene: Branches, cell: Cell) -> None:
    """What it stands on is not what it was."""
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(6)
    scene.snapshot("s3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    for made in ("c4", ""):
        scene.scatter(8)
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported, match="stands on"):
            scene.domain.revert_snapshot("s3")
        if made:
            # also when the base is below another one, and cannot be written any more
            scene.create(made)
            block_jobs.overlay(scene.machine)
            scene.find()
    sound(scene)


def test_a_revert_to_an_image_that_has_left_the_chain(scene: Branches, cell: Cell) -> None:
    """Its bitmaps are still in it, and QEMU would not revert it: they are ours, and go."""
    for target in scene.targets:
        block_jobs.copy(scene.machine, target)
    after_job(scene, "copy")
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)
    goes_on(scene, "later", 9)


@own
def test_an_image_that_has_left_the_chain_with_a_bitmap_of_others_is_refused(
    scene: Branches, cell: Cell
) -> None:
    old = scene.machine.images["vda"]
    block_jobs.copy(scene.machine, "vda")
    scene.find()
    may_load(scene, "s1", cell)
    for name, reason in (("somebody", "not ours"), ("c3", "not ours")):
        subprocess.run(["qemu-img", "bitmap", "--add", str(old), name], check=True)
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported, match=reason):
            scene.domain.revert_snapshot("s1")
        subprocess.run(["qemu-img", "bitmap", "--remove", str(old), name], check=True)
    with subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(old.with_suffix(".sock")), str(old)]
    ) as server:
        await_greeting(old.with_suffix(".sock"), server)
        with unchanged(scene.machine, scene.store), pytest.raises(Busy):
            scene.domain.revert_snapshot("s1")
        server.kill()
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)


# --- a guest that never stops writing --------------------------------------------------------


def _in_snapshot(image: Path, name: str, to: Path) -> bytes:
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-l", f"snapshot.name={name}"]
    subprocess.run([*command, "-O", "raw", str(image), str(to)], check=True)
    return to.read_bytes()


def _writes_on(machine: Machine) -> None:
    """Wait until the guest has gone on for a while to write where it was."""
    first = machine.domain.blockStats("vda")[2]
    deadline = time.monotonic() + 120
    while machine.domain.blockStats("vda")[2] < first + 5:
        assert time.monotonic() < deadline, "the guest does not go on"
        time.sleep(0.1)


def test_not_one_write_of_a_running_guest_escapes(
    stand: Stand, engine: str, tmp_path: Path
) -> None:
    with Guest(stand, (DiskSpec("vda", size=16 * MIB),)) as guest:
        scene = Branches(guest.machine, tmp_path / "store", engine)
        domain, machine = scene.domain, guest.machine
        domain.create("c1")
        guest.shell.churn("vda", 65536, 200)
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


# --- killed on the way -----------------------------------------------------------------------


def _task(scene: Branches, operation: str, point: int, **arguments: object) -> Task:
    return Task(
        uri=scene.machine.uri,
        store=str(scene.store),
        domain=scene.machine.name,
        engine=scene.engine,
        operation=operation,
        arguments=arguments,
        point=point,
        steps_only=not os.environ.get("CKPTMGR_TEST_AT_LEISURE"),
    )


@pytest.fixture
def warm(daemon: Daemon, workspace: Workspace) -> Iterator[Warm]:
    with Warm(workspace, daemon.environment()) as warm:
        yield warm


def _branched(scene: Branches, snapshot: str) -> str:
    """What the next command has made of an interrupted revert: the name of its checkpoint, or
    nothing if it had not begun.
    """
    new = {each.name for each in scene.domain.checkpoints().checkpoints} - set(scene.points)
    if not new:
        return ""
    (name,) = new
    scene.reverted(snapshot, name)
    scene.require_tree()
    return name


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_revert_that_was_killed_at_each_step(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, engine: str, tmp_path: Path
) -> None:
    """The next command completes it: nothing was written meanwhile, and the machine runs."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", engine)
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.scatter(2)
    scene.create("c2")
    tried = []
    for point in itertools.count(1):
        scene.scatter(2 + point)
        left = str(scene.at)
        outcome = warm.run(_task(scene, "revert_snapshot", point, name="s1"))
        assert outcome.status == -signal.SIGKILL, outcome.error
        tried.append(outcome.struck)
        scene.domain.diff("c1")
        made = _branched(scene, "s1")
        where = f"killed {outcome.struck}, point {point}"
        assert scene.state() == "running", where
        assert not (scene.store / scene.domain.view.uuid / "intent.json").exists(), where
        scene.scatter(100 + point)
        for start, end in (("c1", made), ("c2", made), (left, made), (made, None), (left, None)):
            if start and end != "":
                scene.check(start, end)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        # so that the tree stays small
        if made and left not in ("c1", "c2"):
            scene.domain.delete(left)
            scene.deleted(left)
        if outcome.struck == END:
            break
    print(f"killed at {len(tried)} points: {tried}")


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_revert_to_an_image_that_has_left_is_killed_while_bitmaps_are_taken_out(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Of the disk and of the image that comes back, which no QEMU has open."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", "libvirt")
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.loose = True  # a job copies, and where it copies to is marked
    original = scene.machine.images["vda"]
    tried: list[str] = []
    for point in itertools.count(12):  # just before the intent
        if scene.machine.images["vda"] == original:
            original.with_suffix(".copy").unlink(missing_ok=True)
            block_jobs.copy(scene.machine, "vda")
            scene.find()
        scene.scatter(1 + point)
        outcome = warm.run(_task(scene, "revert_snapshot", point, name="s1"))
        assert outcome.status == -signal.SIGKILL, outcome.error
        tried.append(outcome.struck)
        scene.domain.diff("c1")
        made = _branched(scene, "s1")
        where = f"killed {outcome.struck}, point {point}"
        assert scene.state() == "running", where
        assert (scene.machine.images["vda"] == original) == bool(made), where
        scene.scatter(100 + point)
        if made:
            scene.check("c1", made)
            scene.check(made, None)
        scene.check("c1", None)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        if outcome.struck == "in the middle of revert":
            break
    assert any("offline ImageBitmap" in each for each in tried), tried
    print(f"killed at {len(tried)} points: {tried}")


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_snapshot_with_a_checkpoint_that_was_killed_at_each_step(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Whatever is there afterwards is right, and the machine runs."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", "libvirt")
    scene.create("c1")
    for point in itertools.count(1):
        scene.scatter(point)
        name = f"s{point}"
        task = _task(scene, "create_snapshot", point, name=name, checkpoint=True)
        outcome = warm.run(task)
        assert outcome.status == -signal.SIGKILL, outcome.error
        where = f"killed {outcome.struck}, point {point}"
        scene.domain.diff("c1")
        new = {each.name for each in scene.domain.checkpoints().checkpoints} - set(scene.points)
        for made in new:
            scene.made(made)
        taken = {each.name: each for each in scene.domain.snapshots()}
        if name in taken:
            assert taken[name].checkpoint == scene.at, where
            scene.taken(name)
        assert scene.state() == "running", where
        scene.check("c1", None)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        if outcome.struck == END:
            break
