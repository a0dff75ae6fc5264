"""A marker, a name or images of another time than the store is."""

from __future__ import annotations

import shutil
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.evidence import has_checkpoints, known
from integration.stand import Daemon, DiskSpec

from .scene import BOTH, DISKS, Scene, set_marker, three_checkpoints


@pytest.mark.parametrize(
    ("element", "code"),
    [
        (None, "no-marker"),
        ("<current checkpoint='c0' generation='1'/>", "wrong-current"),
        ("<current checkpoint='c9' generation='99'/>", "wrong-current"),
        ("<other/>", "unreadable-marker"),
    ],
)
def test_a_marker_that_is_not_what_the_store_says(
    scene: Scene, element: str | None, code: str
) -> None:
    set_marker(scene, element)
    scene.heals(code, first=False)  # a diff would set it


@pytest.mark.each_release
def test_a_marker_of_checkpoints_that_the_store_does_not_have(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """As with the wrong --store: what it names is not believed, and stays until repair."""
    machine = make_vm([DiskSpec("vda")])
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        host.domain(machine.name).create("c0")
    with ckptmgr.connect(machine.uri, store=tmp_path / "other") as host:
        domain = host.domain(machine.name)
        found = {finding.code for finding in domain.check() if not finding.harmless}
        if not has_checkpoints(machine):
            assert found == {"stray-marker", "orphan-bitmap"}
            domain.repair()
            assert [finding.code for finding in domain.check()] == ["orphan-bitmap"]
            assert domain.checkpoints().checkpoints == ()
            return
        assert found == {"stray-marker", "libvirt-only"}
        domain.repair()
        assert domain.check() == ()
        assert [view.name for view in domain.checkpoints().checkpoints] == ["c0"]


def test_a_domain_that_was_renamed(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.domain.rename(f"{scene.machine.name}-renamed")
    scene.machine.name += "-renamed"
    scene.restart()
    scene.heals("renamed")


def test_libvirt_s_list_comes_back_after_a_rename_and_a_restart_of_the_daemon(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Fact 25: libvirt writes the files to the wrong folder when a domain is renamed."""
    machine = make_vm_on(daemon, DISKS, state="stopped")
    store = tmp_path / "store"
    with three_checkpoints(machine, store) as scene:
        assert scene.codes() == set()
    uuid = machine.domain.UUIDString()
    machine.domain.rename(f"{machine.name}-renamed")
    machine.name += "-renamed"
    daemon.stop()
    daemon.start()
    machine.domain = daemon.handle.lookupByUUIDString(uuid)
    assert known(machine) == {}
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene.host = host
        scene.heals("renamed", "store-only")
        assert known(machine)["c2"] == "c1"


@pytest.mark.parametrize("definition", [True, False], ids=["with-the-domain", "image-alone"])
def test_images_that_were_put_back(scene: Scene, definition: bool) -> None:
    """A storage snapshot of the time of c2, put back after c3 and more writes."""
    if scene.machine.active:
        scene.machine.stop()
    kept = {path: path.with_suffix(".kept") for path in scene.machine.images.values()}
    for path, kept_copy in kept.items():
        shutil.copyfile(path, kept_copy)
    xml = scene.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    then = {target: scene.machine.contents(target) for target in BOTH}
    scene.machine.start()
    scene.create("c3")
    scene.machine.stop()
    for path, kept_copy in kept.items():
        shutil.move(kept_copy, path)
    if definition:
        scene.machine.domain = scene.machine.stand.handle.defineXML(xml)
    assert {target: scene.machine.contents(target) for target in BOTH} == then
    scene.restart()
    scene.timeline._contents.pop("", None)
    scene.replaced = set(BOTH)  # what the timeline wrote since is not there
    found = {finding.code for finding in scene.domain.check() if not finding.harmless}
    scene.heals(*found, first=False)
    assert "rolled-back" in found
    views = {view.name: view for view in scene.domain.checkpoints().checkpoints}
    assert views["n1"].parent == "c2"
    assert views["c3"].parent == "c2"
    assert scene.known("c3", "n1") == BOTH
    assert scene.known("c0") == BOTH
