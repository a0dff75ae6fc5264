"""A deleted checkpoint's bitmaps go from every image, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from ckptmgr.errors import BitmapBroken, Busy
from integration.block_jobs import overlay
from integration.conftest import MakeMachine
from integration.stand import MIB, Machine, Stand

from .driver import DISKS, LIBVIRT, MONITOR, OFFLINE, Driver, extents, holding


@pytest.mark.each_release
def test_a_deleted_checkpoint_leaves_the_others_alone(driver: Driver) -> None:
    driver.create("c0")
    driver.create("c1", "c0")
    driver.create("c2", "c1")
    driver.engine.run(driver.delete_plan("c1").steps)
    assert {name for _, _, name in driver.bitmaps()} == {"c0", "c2"}
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.read("c2").maps)["vda"] == [(MIB, MIB)]


@pytest.mark.each_release
def test_delete_reaches_through_the_backing_chain(running: Driver) -> None:
    machine = running.machine
    if running.name is MONITOR:
        running.targets.remove("vdc")
    running.create("c0")
    running.create("c1", "c0")
    overlay(machine, "vda", "vdb")
    before = nodes(machine)
    assert len([entry for entry in running.bitmaps() if entry[2] == "c0"]) == 4
    running.engine.run(running.delete_plan("c0").steps)
    assert {name for _, _, name in running.bitmaps()} == {"c1"}
    assert nodes(machine) == before  # read-only nodes are read-only again, caches as they were
    machine.write("vda", MIB, MIB)
    assert extents(running.read("c1").maps)["vda"] == [(MIB, MIB)]


def nodes(machine: Machine) -> dict[str, tuple[Any, ...]]:
    return {
        node["node-name"]: (node["ro"], node["cache"], node["detect_zeroes"])
        for node in machine.qmp("query-named-block-nodes", flat=True)
    }


@pytest.mark.each_release
def test_an_offline_delete_reaches_through_the_backing_chain(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:2])
    Driver(machine, MONITOR).create("c0")
    overlay(machine, "vda")
    machine.stop()
    driver = Driver(machine, OFFLINE)
    assert len([entry for entry in driver.bitmaps() if entry[0] == "vda"]) == 2
    driver.engine.run(driver.delete_plan("c0").steps)
    assert driver.bitmaps() == set()


def test_delete_after_a_lost_bitmap_names_the_disk_and_then_works_without_it(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:2])
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    with pytest.raises(BitmapBroken) as caught:
        driver.engine.run(driver.delete_plan("c0").steps)
    assert caught.value.disk == "vda"
    driver.engine.run(driver.delete_plan("c0", missing=("vda",)).steps)
    assert driver.bitmaps() == set()
    assert driver.known() == set()


def test_a_backing_image_that_others_use_is_not_touched(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    driver = Driver(machine, MONITOR)
    driver.create("c0")
    below = machine.images["vda"]
    overlay(machine, "vda")
    before, bitmaps = nodes(machine), driver.bitmaps()
    with holding(below):
        with pytest.raises(Busy) as caught:
            driver.engine.run(driver.delete_plan("c0").steps)
        assert str(below) in caught.value.message
        assert "vda" in caught.value.message
        assert driver.bitmaps() == bitmaps
        assert nodes(machine) == before
