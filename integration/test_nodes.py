"""Block nodes: never detected where libvirt assigns them, found for certain where it does not."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from lxml import etree

import ckptmgr
from ckptmgr.domain import nodes
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.disk import Disk, Image
from ckptmgr.domain.nodes import detect_nodes
from integration.conftest import MakeMachine
from integration.evidence import DISKS, Timeline, bitmaps, domain_of, known
from integration.stand import MIB, Machine, rounded


@pytest.mark.each_release
def test_no_detection_is_run_on_blockdev(
    make_vm: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "With blockdev we shouldn't ever do that": the code is not entered, by any engine."""

    def entered(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("node names were detected on a domain that is on blockdev")

    monkeypatch.setattr(nodes, "detect_nodes", entered)
    machine = make_vm(DISKS)
    timeline = Timeline(machine)
    for name, engine in (("c0", "monitor"), ("c1", "libvirt"), ("c2", "monitor")):
        view = domain_of(machine, tmp_path, engine).create(name)
        timeline.cut(name)
        timeline.write("vdb", 1_000_000, 5000)
        found = {disk.name: disk.node for disk in view.disks}
        assert found["vda"] == machine.node("vda")
        assert found["vdb"] == machine.node("vdb")
    domain = domain_of(machine, tmp_path, "monitor")
    timeline.check(domain, "c0", "c2", {"vda", "vdb", "vdc", "sda"})
    assert domain.adapter.on_blockdev()
    domain.checkpoint("c1", size=True)
    domain.delete("c0", children=True)


# --- -drive ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drive:
    """A disk on -drive, as libvirt starts one without blockdev."""

    target: str
    bus: str
    alias: str
    device: str
    images: tuple[str, ...]

    @property
    def path(self) -> str:
        """The device in QEMU's object tree."""
        suffix = "/virtio-backend" if self.bus == "virtio" else ""
        return f"/machine/peripheral/{self.alias}{suffix}"


DRIVES = (
    Drive(
        "vdx",
        "virtio",
        "virtio-disk7",
        "virtio-blk-pci,addr=0x12,",
        ("x.qcow2", "y.qcow2", "z.raw"),
    ),
    Drive("sdx", "scsi", "scsi7-0-0-0", "scsi-hd,bus=scsi7.0,", ("s.qcow2", "t.qcow2")),
    Drive("sdy", "sata", "sata7-0-0", "ide-hd,bus=sata7.0,", ("u.qcow2",)),
)


class Drives:
    """A machine whose disks are all on -drive, through <qemu:commandline>.

    disks -- what libvirt would say of them if it had started them so
    """

    def __init__(self, make_vm: MakeMachine, folder: Path) -> None:
        arguments = ["-device", "virtio-scsi-pci,id=scsi7,addr=0x10"]
        arguments += ["-device", "ich9-ahci,id=sata7,addr=0x11"]
        disks = []
        for drive in DRIVES:
            chain: list[Image] = []
            for name in reversed(drive.images):
                path, form = str(folder / name), name.rpartition(".")[2]
                below = ["-b", chain[0].source, "-F", chain[0].format or ""] if chain else []
                create = ["qemu-img", "create", "-q", "-f", form, *below, path, str(4 * MIB)]
                subprocess.run(create, check=True)
                chain.insert(0, Image("file", path, path, form))
            options = f"file={chain[0].path},format=qcow2,if=none,id=drive-{drive.alias}"
            arguments += ["-drive", options, "-device"]
            arguments += [f"{drive.device}drive=drive-{drive.alias},id={drive.alias}"]
            disks.append(Disk(drive.target, drive.bus, alias=drive.alias, chain=tuple(chain)))
        self.disks = tuple(disks)
        self.machine: Machine = make_vm((), commandline=arguments)

    def detect(self, *disks: Disk) -> dict[str, tuple[str, ...]]:
        qmp = self.machine.qmp
        named = qmp("query-named-block-nodes", flat=True)
        return detect_nodes(disks, qmp("query-block"), qmp("query-blockstats"), named)

    def xml(self) -> str:
        """The machine's XML with the disks, as libvirt 7.0 on -drive words it: no index."""
        root = etree.fromstring(self.machine.domain.XMLDesc())
        devices = root.find("devices")
        assert devices is not None
        for disk in self.disks:
            element = etree.SubElement(devices, "disk", type="file", device="disk")
            etree.SubElement(element, "target", dev=disk.target, bus=disk.bus)
            etree.SubElement(element, "alias", name=disk.alias or "")
            etree.SubElement(element, "driver", name="qemu", type=disk.top.format or "")
            for image in disk.chain:
                if image is not disk.top:
                    element = etree.SubElement(element, "backingStore", type="file")
                    etree.SubElement(element, "format", type=image.format or "")
                etree.SubElement(element, "source", file=image.source)
            etree.SubElement(element, "backingStore")
        return etree.tostring(root, encoding="unicode")


def test_checkpoints_of_disks_on_drive(
    make_vm: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """virtio, SCSI and SATA, with backing chains: each bitmap is on the right disk."""
    drives = Drives(make_vm, tmp_path)
    machine, store = drives.machine, tmp_path / "store"
    described = drives.xml()
    monkeypatch.setattr(DomainAdapter, "_xml", lambda self, flags=0: described)
    domain = domain_of(machine, store)

    def write(number: int) -> dict[str, list[tuple[int, int]]]:
        written = {}
        for at, drive in enumerate(DRIVES, start=1):
            offset, length = number * MIB, at * 65536
            machine.hmp(f'qemu-io -d {drive.path} "write {offset} {length}"')
            written[drive.target] = rounded([(offset, length)])
        return written

    view = domain.create("c0")
    assert view.engine == "monitor"  # libvirt makes checkpoints on blockdev only
    assert all(str(disk.node).startswith("#block") for disk in view.disks)
    assert [len(drives.detect(disk)[disk.target]) for disk in drives.disks] == [3, 2, 1]
    first = write(1)
    domain.create("c1")
    second = write(2)
    assert {disk.name: disk.extents() for disk in domain.diff("c0", "c1").disks} == first
    assert {disk.name: disk.extents() for disk in domain.diff("c1").disks} == second
    tops = {drive.images[0] for drive in DRIVES}
    assert bitmaps(machine) == {(top, name) for top in tops for name in ("c0", "c1")}
    assert known(machine) == {}
    domain.delete("c0")
    assert bitmaps(machine) == {(top, "c1") for top in tops}
    assert {disk.name: disk.extents() for disk in domain.diff("c1").disks} == second


def test_drives_that_cannot_be_told_for_certain_are_named_and_refused(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    drives = Drives(make_vm, tmp_path)
    vdx, sdx, sdy = drives.disks
    for disks in ((sdx, replace(sdy, chain=sdx.chain)), (replace(sdx, chain=sdy.chain), sdy)):
        with pytest.raises(ckptmgr.NodeUnknown, match="on the same image") as caught:
            drives.detect(*disks)
        assert "sdx" in str(caught.value)
        assert "sdy" in str(caught.value)
    other = replace(sdy.top, source="/other", path="/other")
    for words, disk in {
        "no device": replace(sdx, alias="scsi7-0-0-1"),
        "chain of 2 images and QEMU one of 3": replace(vdx, chain=vdx.chain[:2]),
        "/other where QEMU has": replace(sdy, chain=(other,)),
        "is raw for libvirt": replace(sdy, chain=(replace(sdy.top, format="raw"),)),
    }.items():
        with pytest.raises(ckptmgr.NodeUnknown, match=words) as caught:
            drives.detect(disk)
        assert disk.target in str(caught.value)
