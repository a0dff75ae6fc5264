"""What check and repair leave alone, and how they go on when a cure fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.evidence import unchanged
from integration.stand import DiskSpec

from .scene import METADATA_ONLY, NAMES, REDEFINE, Scene, opened


def test_looking_changes_nothing(scene: Scene) -> None:
    scene.remove("vda", "c1")
    with unchanged(scene.machine, scene.store):
        scene.domain.check()
        scene.domain.plan_repair(foreign=True)
        scene.domain.plan_archive()


def test_a_domain_without_checkpoints_is_consistent_and_gets_no_store(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm([DiskSpec("vda")], state="stopped")
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        assert host.domain(machine.name).check() == ()
    assert not (tmp_path / "store").exists()


@pytest.mark.each_release
def test_without_the_monitor_a_domain_is_not_tainted(make_vm: MakeMachine, tmp_path: Path) -> None:
    """With --engine libvirt, check and repair use libvirt's own calls alone."""
    machine = make_vm([DiskSpec("vda"), DiskSpec("vdb")])

    def tainted() -> bool:
        return any("custom monitor" in text for text in machine.domain.messages())

    with ckptmgr.connect(machine.uri, store=tmp_path / "store", engine="libvirt") as host:
        domain = host.domain(machine.name)
        for name in NAMES:
            domain.create(name)
        assert domain.check() == ()
        # c1's bitmap goes from vdb, through a checkpoint of libvirt's that names it
        machine.domain.checkpointCreateXML(
            "<domaincheckpoint><name>x</name><creationTime>1</creationTime>"
            "<disks><disk name='vdb' bitmap='c1'/></disks></domaincheckpoint>",
            REDEFINE,
        ).delete()
        machine.domain.checkpointLookupByName("c0").delete(METADATA_ONLY)
        found = {(each.code, each.checkpoint) for each in domain.check()}
        assert found == {("missing-bitmap", "c1"), ("store-only", "c0")}
        domain.repair()
        assert domain.check() == ()
        domain.archive(keep=1)
        assert domain.check() == ()
        domain.create("c3")
        assert not tainted()
    assert set(machine.bitmaps("vda")) == {"c2", "c3"}
    assert set(machine.bitmaps("vdb")) == {"c2", "c3"}
    assert tainted()  # by this question


def test_a_cure_that_fails_is_told_and_the_others_are_done(
    make_vm: MakeMachine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_vm([DiskSpec("vda"), DiskSpec("vdb")], state="stopped")
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        domain = host.domain(machine.name)
        domain.create("c0")
        for target in ("vda", "vdb"):
            command = ["qemu-img", "bitmap", "--add", str(machine.images[target]), "stray"]
            subprocess.run(command, check=True)
        with opened(machine.images["vda"], "-r"):
            cured = domain.repair(foreign=True)
            assert [each.disk for each in cured] == ["vdb"]
            assert "could not be cured" in caplog.text
        assert [each.disk for each in domain.repair(foreign=True)] == ["vda"]
        assert domain.check() == ()
