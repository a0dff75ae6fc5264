"""Files of the store that are lost or cannot be read."""

from __future__ import annotations

import pytest

import ckptmgr
from integration.evidence import unchanged

from .scene import BOTH, NAMES, Scene, set_marker


@pytest.mark.parametrize("name", NAMES)
def test_a_document_that_cannot_be_read(scene: Scene, name: str) -> None:
    path = scene.folder / f"{name}.xml"
    path.write_bytes(path.read_bytes()[:-100])
    codes = {"unreadable-file"}
    if name == "c2":
        codes.add("current-lost")
    assert scene.codes() >= {"unreadable-file"}
    scene.sound()
    with unchanged(scene.machine, scene.store):
        scene.domain.plan_repair()
    scene.domain.repair()
    assert (scene.folder / f"{name}.xml.damaged").exists()
    assert scene.codes() == set()
    # libvirt has it still; what changed up to it is lost with its file.
    assert name in scene.names()
    assert scene.known(name) == BOTH
    scene.sound()
    scene.goes_on()


def test_a_map_that_cannot_be_read(scene: Scene) -> None:
    for path in (scene.folder / "maps").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    scene.heals("damaged-map")
    assert scene.known("c0", "c1") == set()


def test_a_record_that_cannot_be_read(scene: Scene) -> None:
    (scene.folder / "domain.json").write_bytes(b"\xff")
    assert scene.domain.current() is not None
    scene.timeline.check_all(scene.domain, NAMES, BOTH)
    scene.heals("unreadable-file")


def test_a_record_and_a_marker_that_are_lost(scene: Scene) -> None:
    (scene.folder / "domain.json").unlink()
    set_marker(scene, None)
    current = scene.domain.current()
    assert current is not None
    assert current.name == "c2"
    scene.heals("current-lost", "no-marker", first=False)


def test_an_intent_that_cannot_be_read_stops_changes_until_it_is_repaired(scene: Scene) -> None:
    (scene.folder / "intent.json").write_bytes(b"{}")
    with unchanged(scene.machine, scene.store), pytest.raises(ckptmgr.StoreDamaged) as caught:
        scene.domain.create("n1")
    assert "ckptmgr repair" in str(caught.value.hint)
    assert scene.codes() == {"unreadable-file"}
    scene.domain.repair()
    assert (scene.folder / "intent.json.damaged").exists()
    scene.goes_on()
