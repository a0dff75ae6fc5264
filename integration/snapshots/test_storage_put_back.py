"""After images were put back from a copy, nothing that differs is called clean."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

from integration.branch_model import Branches

from .scene import SNAPSHOTS, MakeBranches, goes_on, releases_if_long, repaired

pytestmark = SNAPSHOTS


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
    "xml",
    [
        pytest.param(True, id="with its XML"),
        pytest.param(False, id="alone", marks=releases_if_long),
    ],
)
@pytest.mark.parametrize(
    "only",
    [pytest.param("", id="all disks"), pytest.param("vda", id="one disk", marks=releases_if_long)],
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


@releases_if_long
@pytest.mark.thorough("monitor")
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


@releases_if_long
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
