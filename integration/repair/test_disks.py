"""Disks that were replaced, moved, resized, or that a block job went over; images that are gone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt

from ckptmgr.consistency import consistent
from integration import block_jobs
from integration.conftest import MakeMachine
from integration.evidence import files, unchanged
from integration.stand import MIB

from .scene import BOTH, DISKS, NAMES, REDEFINE, Scene, opened, running, three_checkpoints


def _redefine(scene: Scene, change: Callable[[str], str]) -> None:
    """Change the stopped domain's definition."""
    xml = scene.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    scene.machine.domain = scene.machine.stand.handle.defineXML(change(xml))


def test_another_image_in_the_place_of_a_disk(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    old = scene.machine.images["vda"]
    new = old.with_name("other.qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(new), str(DISKS[0].size)], check=True
    )
    _redefine(scene, lambda xml: xml.replace(str(old), str(new)))
    scene.machine.images["vda"] = new
    scene.restart()
    scene.replaced.add("vda")
    scene.heals("disk-replaced")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}


def test_an_image_that_was_moved_with_its_bitmaps_costs_nothing(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    old = scene.machine.images["vda"]
    new = old.with_name("moved.qcow2")
    old.rename(new)
    _redefine(scene, lambda xml: xml.replace(str(old), str(new)))
    scene.machine.images["vda"] = new
    scene.restart()
    assert [each.code for each in scene.domain.check()] == ["image-moved"]
    scene.timeline.check_all(scene.domain, NAMES, BOTH)


def _grow(scene: Scene) -> None:
    size = 24 * MIB
    scene.replaced.add("vda")  # its last granule is whole now
    if scene.machine.active:
        flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        scene.machine.domain.blockResize("vda", size, flags)
    else:
        command = ["qemu-img", "resize", "-q", str(scene.machine.images["vda"]), str(size)]
        subprocess.run(command, check=True)


def test_a_grown_disk_is_told_and_its_new_part_counts_as_changed(scene: Scene) -> None:
    _grow(scene)
    found = scene.domain.check()
    assert [(each.code, each.harmless) for each in found] == [("disk-resized", True)]
    assert consistent(found)
    scene.sound()
    (vda, _) = scene.domain.diff("c2").disks
    assert vda.known
    assert sum(vda.extents()[-1]) == 24 * MIB
    scene.create("n1")
    assert scene.domain.check() == ()
    scene.sound()


def test_a_disk_that_was_made_smaller(scene: Scene) -> None:
    size = 8 * MIB
    scene.replaced.add("vda")
    if scene.machine.active:
        scene.machine.domain.blockResize("vda", size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    else:
        command = ["qemu-img", "resize", "-q", "--shrink"]
        subprocess.run([*command, str(scene.machine.images["vda"]), str(size)], check=True)
    assert scene.codes() == {"disk-shrunk"}
    scene.sound()
    assert {finding.code for finding in scene.domain.repair()} == {"disk-shrunk"}
    assert scene.codes() == set()
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}
    scene.sound()
    scene.domain.create("n1")
    scene.machine.write("vda", 5 * MIB, 4096)
    (vda, _) = scene.domain.diff("n1").disks
    assert vda.extents() == [(5 * MIB, 65536)]
    assert scene.codes() == set()


@running
def test_a_snapshot_costs_nothing(scene: Scene) -> None:
    block_jobs.overlay(scene.machine)
    scene.timeline.scatter()
    found = scene.domain.check()
    assert consistent(found)
    changed = {(each.code, each.disk) for each in found}
    assert {("node-changed", target) for target in BOTH} <= changed
    scene.timeline.check_all(scene.domain, NAMES, BOTH)


@running
def test_a_layer_smaller_than_its_overlay(scene: Scene) -> None:
    block_jobs.overlay(scene.machine)
    scene.timeline.scatter()
    _grow(scene)
    scene.timeline.scatter()
    scene.heals("layer-smaller")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}


@running
def test_a_bitmap_that_a_block_job_emptied_is_not_believed(scene: Scene) -> None:
    """Fact 23: without this, the next increment would be all clean."""
    block_jobs.overlay(scene.machine)
    _grow(scene)
    block_jobs.pull(scene.machine, "vda")
    # libvirt and QEMU find nothing wrong with it:
    document = scene.domain.document("c2")
    validate = REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
    scene.machine.domain.checkpointCreateXML(document, validate)
    scene.heals("bitmap-lost-in-job")


def test_an_image_that_another_program_is_writing_is_not_judged(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """All its bitmaps are marked as in use, as after a crash, until that program ends."""
    machine = make_vm(DISKS, state="stopped")
    store = tmp_path / "store"
    with three_checkpoints(machine, store) as scene:
        with opened(machine.images["vda"]):
            (bitmap, *_) = machine.bitmaps("vda").values()
            assert "in-use" in bitmap["flags"]
            assert scene.codes() == {"image-in-use"}
            with unchanged(machine, store):
                assert scene.domain.repair(foreign=True) == ()
        assert scene.codes() == set()
        scene.timeline.check_all(scene.domain, NAMES, BOTH)


def test_an_image_that_is_lost_is_named_and_closed_intervals_are_still_told(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(DISKS, state="stopped")
    store = tmp_path / "store"
    with three_checkpoints(machine, store) as scene:
        scene.domain.archive()
        machine.images["vda"].unlink()
        assert scene.codes() == {"unreadable-image"}
        written: Any = scene.timeline.expected("vda", "c0", "c2", 65536)
        (vda, vdb) = scene.domain.diff("c0", "c2").disks
        assert vda.extents() == written
        assert vdb.known
        assert files(store)
