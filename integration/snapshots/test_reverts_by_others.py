"""After a revert that was not ours, the history goes on from where the domain is."""

from __future__ import annotations

import logging

import libvirt
import pytest

from integration import block_jobs
from integration.branch_model import Branches
from integration.evidence import bitmaps

from .scene import SNAPSHOTS, MakeBranches, goes_on, releases_if_long, repaired, sound

pytestmark = SNAPSHOTS


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
    "first",
    [
        "create",
        *(pytest.param(each, marks=releases_if_long) for each in ("diff", "repair", "check")),
    ],
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


@releases_if_long
def test_reverts_behind_our_back_one_after_the_other(scene: Branches) -> None:
    libvirts_own(scene, "s1")
    scene.scatter(6)
    libvirts_own(scene, "s2")
    scene.scatter(7)
    libvirts_own(scene, "s1")
    scene.scatter(8)
    repaired(scene)
    goes_on(scene, "later", 9)


@releases_if_long
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
