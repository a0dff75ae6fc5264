"""Snapshots of each kind are taken, listed and deleted, and reverted to where libvirt can."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.errors import CkptmgrError, InvalidRequest, NoSnapshot, OperationFailed, Unsupported
from integration.branch_model import Branches
from integration.evidence import bitmaps, unchanged
from integration.stacks.table import Cell

from .scene import SNAPSHOTS, MakeBranches, goes_on, releases_if_long, sound, unnamed

pytestmark = SNAPSHOTS


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


@releases_if_long
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


@releases_if_long
def test_bitmaps_that_qemu_has_let_go_of_are_not_taken_for_empty(make: MakeBranches) -> None:
    """A paused domain whose memory went to a file: its QEMU has none until it runs again."""
    scene = make()
    scene.create("c1")
    scene.scatter(1)
    _external(scene, "e1", memory=True)
    domain = scene.domain
    for act in (lambda: domain.diff("c1"), lambda: domain.create("c2"), domain.repair):
        with pytest.raises(OperationFailed, match="let go of the images") as caught:
            act()
        assert "virsh resume" in str(caught.value.hint)
    scene.machine.domain.resume()
    scene.scatter(2)
    sound(scene)
    goes_on(scene, "later", 3)


def externals_revert(scene: Branches) -> bool:
    """Whether this libvirt reverts to external snapshots: 9.9 and later do."""
    return bool(scene.machine.stand.handle.getLibVersion() >= 9_009_000)


@releases_if_long
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


@releases_if_long
def test_a_snapshot_that_cannot_be_taken_leaves_no_checkpoint(
    make: MakeBranches, tmp_path: Path
) -> None:
    scene = make(state="running")
    nowhere = str(tmp_path / "no" / "such" / "folder")
    for before in (["c1"], ["c1", "c2"]):
        scene.create(before[-1])
        scene.scatter(len(before))
        there = set(bitmaps(scene.machine))
        with pytest.raises(CkptmgrError, match="taking the snapshot failed"):
            scene.domain.create_snapshot("s1", checkpoint=True, memory=nowhere)
        assert [each.name for each in scene.domain.checkpoints().checkpoints] == before
        assert set(bitmaps(scene.machine)) == there
        assert scene.state() == "running"
    sound(scene)
