"""Bitmaps that nobody knows of, that are lost, or that record no more."""

from __future__ import annotations

import subprocess

import pytest

from integration.evidence import bitmaps

from .scene import BOTH, NAMES, Scene


@pytest.mark.parametrize("name", ["stray", "with space <&'\">", "c1x"])
def test_an_orphan_bitmap_goes_only_when_told_to(scene: Scene, name: str) -> None:
    scene.add("vda", name)
    before = bitmaps(scene.machine)
    assert scene.codes() == {"orphan-bitmap"}
    assert scene.domain.repair() == ()
    assert bitmaps(scene.machine) == before
    scene.heals("orphan-bitmap", foreign=True)


def test_an_orphan_in_a_backing_image_is_named_with_that_image(scene: Scene) -> None:
    scene.machine.stop() if scene.machine.active else None
    base = scene.machine.folder / "vdb-base1.qcow2"
    subprocess.run(["qemu-img", "bitmap", "--add", str(base), "tpl"], check=True)
    scene.restart()
    (finding,) = [each for each in scene.domain.check() if not each.harmless]
    assert str(base) in finding.message
    scene.heals("orphan-bitmap", foreign=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_bitmap_costs_what_it_alone_knew(scene: Scene, name: str) -> None:
    scene.remove("vda", name)
    scene.heals("missing-bitmap")
    for start, end in (("c0", "c1"), ("c1", "c2"), ("c0", "c2")):
        assert scene.known(start, end) == BOTH
    if name != "c2":
        assert scene.known(name) == BOTH


def test_bitmaps_that_a_crash_lost(scene: Scene) -> None:
    if scene.state == "stopped":
        scene.machine.start()
    scene.domain.create("c3")  # those before are in the image
    scene.timeline.cut("c3")
    scene.machine.kill()
    scene.restart()
    scene.heals("missing-bitmap", "inconsistent-bitmap")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == set()


def test_bitmaps_that_a_crash_left_in_use(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.start()
    scene.timeline.scatter()
    scene.machine.kill()
    scene.restart()
    scene.heals("inconsistent-bitmap")
    assert scene.known("c0", "c2") == BOTH


def test_after_a_crash_the_next_create_goes_on_without_repair(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.start()
    scene.timeline.scatter()
    scene.machine.kill()
    scene.restart()
    scene.create("n1")
    scene.create("n2")
    scene.timeline.check(scene.domain, "n1", "n2", BOTH)
    scene.timeline.check(scene.domain, "n2", None, BOTH)
    scene.timeline.check(scene.domain, "c0", "c2", BOTH)
    assert scene.known("c2", "n1") == set()
    scene.sound()


def test_a_bitmap_that_was_let_go_of_is_there_again(scene: Scene) -> None:
    scene.domain.archive()
    scene.add("vda", "c0")
    scene.heals("stale-bitmap")


def test_a_bitmap_that_records_no_more(scene: Scene) -> None:
    if scene.machine.active:
        node = scene.machine.node("vdb")
        scene.machine.qmp("block-dirty-bitmap-disable", node=node, name="c1")
    else:
        command = ["qemu-img", "bitmap", "--disable", str(scene.machine.images["vdb"]), "c1"]
        subprocess.run(command, check=True)
    scene.heals("broken-bitmap")
