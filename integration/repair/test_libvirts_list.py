"""Checkpoints that libvirt has and the store lacks, or the other way round."""

from __future__ import annotations

import pytest

from integration.evidence import known

from .scene import BOTH, METADATA_ONLY, NAMES, REDEFINE, Scene


def test_a_checkpoint_that_only_libvirt_knows(scene: Scene) -> None:
    xml = "<domaincheckpoint><name>virsh</name><creationTime>1</creationTime>{}</domaincheckpoint>"
    if scene.machine.active:
        scene.machine.domain.checkpointCreateXML(xml.format(""), 0)
    else:
        for target in BOTH:
            scene.add(target, "virsh")
        parent = "<parent><name>c2</name></parent>"
        disks = "".join(f"<disk name='{each}' bitmap='virsh'/>" for each in sorted(BOTH))
        document = xml.format(f"{parent}<disks>{disks}</disks>")
        scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.timeline.cut("virsh")
    scene.heals("libvirt-only")
    assert "virsh" in scene.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_only_the_store_knows(scene: Scene, name: str) -> None:
    scene.machine.domain.checkpointLookupByName(name).delete(METADATA_ONLY)
    scene.heals("store-only", first=False)  # a diff would show libvirt what it reads


def test_a_list_that_libvirt_lost_altogether(scene: Scene) -> None:
    for each in scene.machine.domain.listAllCheckpoints():
        each.delete(METADATA_ONLY)
    scene.heals("store-only", first=False)
    assert known(scene.machine)["c2"] == "c1"


def test_a_wrong_parent(scene: Scene) -> None:
    document = scene.domain.document("c2").replace("<name>c1</name>", "<name>c0</name>")
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    assert known(scene.machine)["c2"] == "c0"
    scene.heals("wrong-parent")
    assert known(scene.machine)["c2"] == "c1"


def test_a_checkpoint_that_libvirt_has_with_other_disks(scene: Scene) -> None:
    document = scene.domain.document("c1").replace(
        "<disk name='vdb' checkpoint='bitmap' bitmap='c1'/>",
        "<disk name='vdb' checkpoint='no'/>",
    )
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.heals("libvirt-disks")


def test_a_checkpoint_that_libvirt_should_not_have_any_more(scene: Scene) -> None:
    document = scene.domain.document("c0")
    scene.domain.archive()
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.heals("libvirt-stale")
    assert "c0" not in known(scene.machine)


def test_the_dummy_of_a_killed_removal(scene: Scene) -> None:
    scene.machine.domain.checkpointCreateXML(
        "<domaincheckpoint><name>ckptmgr-discard</name><creationTime>1</creationTime>"
        "<disks><disk name='vda' bitmap='c1'/></disks></domaincheckpoint>",
        REDEFINE,
    )
    scene.heals("leftover-checkpoint")
