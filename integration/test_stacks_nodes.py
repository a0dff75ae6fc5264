"""Which node is which disk's, on each way that libvirt has of giving disks to QEMU."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.domain import nodes
from ckptmgr.domain.disk import Disk
from ckptmgr.errors import NodeUnknown
from integration.conftest import MakeMachine
from integration.stacks import Stack
from integration.stacks.fixtures import Stacks
from integration.stacks.table import Cell
from integration.stand import DiskSpec, Machine
from integration.tracked import LIBVIRT, MONITOR, Tracked, check_history

EVERY_BUS = (
    DiskSpec("hda", device="cdrom", format="raw", empty=True, read_only=True),
    DiskSpec("sda"),
    DiskSpec("sdb", bus="sata"),
    DiskSpec("vda", backing=("qcow2", "raw")),
    DiskSpec("vdb", format="raw"),
)


def capabilities(*, add: str = "", remove: str = "") -> str:
    """What adds or removes a capability of QEMU, as libvirt sees it, for one domain."""
    changes = [("add", add), ("del", remove)]
    return "".join(f"<qemu:{verb} capability='{name}'/>" for verb, name in changes if name)


@pytest.fixture
def debian11(stacks: Stacks) -> Stack:
    """libvirt 7.0 with QEMU 5.2."""
    return stacks("debian11")


def chain(machine: Machine, target: str) -> tuple[str, ...]:
    """Node names of the layers under the device that ``machine.write`` writes through.

    By QEMU's own graph of its nodes, from the device down; no name of a file is looked at.
    """
    device = machine.device(target)
    alias = device.removeprefix("/machine/peripheral/").partition("/")[0]
    graph = machine.qmp("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    below = {(edge["parent"], edge["name"]): edge["child"] for edge in graph["edges"]}
    (backend,) = (
        node["id"]
        for node in graph["nodes"]
        if node["type"] == "block-backend" and node["name"] in (device, alias, f"drive-{alias}")
    )
    layer = below.get((backend, "root"))
    found = []
    while layer is not None:
        found.append(names[layer])
        layer = below.get((layer, "backing"))
    return tuple(found)


def bitmaps(machine: Machine, target: str) -> dict[str, int]:
    """Bitmaps on the node of a disk's top layer, and how many bytes each has marked."""
    top = chain(machine, target)[0]
    (node,) = (
        node
        for node in machine.qmp("query-named-block-nodes", flat=True)
        if node["node-name"] == top
    )
    assert node["file"] == str(machine.images[target])
    return {bitmap["name"]: bitmap["count"] for bitmap in node.get("dirty-bitmaps", [])}


STARTED = ["debian11 -drive", "debian11 -blockdev", "debian12 -blockdev", "debian13 -blockdev"]
"""The stacks, and how each gives QEMU its disks; from libvirt 8 on there is one way."""


def with_every_bus(started: str, stacks: Stacks, make_vm_on: MakeMachine) -> Machine:
    """A machine with disks on every bus, two of them on one and the same backing image."""
    name, _, how = started.partition(" ")
    stack = stacks(name)
    folder = stack.workspace.folder("i")
    base = DiskSpec("base", bus="none").make(folder)
    overlays = []
    for target in ("sdc", "vdc"):
        image = folder / target
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2"]
        subprocess.run([*create, str(image)], check=True)
        bus = "sata" if target == "sdc" else "virtio"
        overlays.append(DiskSpec(target, image=image, bus=bus))
    changes = capabilities(remove="blockdev") if how == "-drive" else ""
    return make_vm_on(stack, (*EVERY_BUS, *overlays), capabilities=changes)


def check_nodes(tracked: Tracked) -> None:
    """Bitmaps are on the nodes of their disks, all commands find them there and nowhere else."""
    machine = tracked.machine
    nodes = {target: chain(machine, target) for target in machine.images}
    assert tracked.domain.adapter.nodes() == nodes
    for number in range(3):
        created = tracked.create(f"c{number}")
        assert created.engine is MONITOR
        assert {disk.name: disk.node for disk in created.disks if disk.bitmap} == {
            target: names[0] for target, names in nodes.items()
        }
        tracked.write(number)
        for start in range(number + 1):
            assert tracked.shown(f"c{start}") == tracked.written(f"c{start}")
    for target in machine.images:
        assert bitmaps(machine, target) == {
            name: sum(length for _, length in tracked.written(name)[target])
            for name in ("c0", "c1", "c2")
        }
    assert tracked.shown("c0", "c1") == tracked.written("c0", "c1")
    assert tracked.problems() == []
    assert tracked.domain.delete("c1") == ("c1",)
    assert tracked.shown("c0", "c2") == tracked.written("c0", "c2")
    assert tracked.domain.delete("c0", children=True) == ("c0", "c2")
    assert not any(bitmaps(machine, target) for target in machine.images)


@pytest.mark.scenario("virtio, SCSI and SATA disks, backing chains, an empty cdrom")
@pytest.mark.parametrize("started", STARTED)
def test_bitmaps_are_on_the_nodes_of_their_disks(
    started: str,
    stacks: Stacks,
    make_vm_on: MakeMachine,
    cell: Cell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, _, how = started.partition(" ")
    cell.of(stack=started if name == "debian11" else name, engine=MONITOR)
    detect, detections = nodes.detect_nodes, []

    def noted(*arguments: Any, **options: Any) -> Any:
        detections.append(arguments)
        return detect(*arguments, **options)

    monkeypatch.setattr(nodes, "detect_nodes", noted)
    machine = with_every_bus(started, stacks, make_vm_on)
    # on Debian 11 it is chosen
    check_nodes(Tracked(stacks(name), machine, None if name == "debian11" else MONITOR))
    assert bool(detections) == (how == "-drive")


def by_file_name(disks: Sequence[Disk], *answers: Any, **_: Any) -> dict[str, tuple[str, ...]]:
    """The mistake: a node is known by the name of its image alone."""
    files = {node["file"]: node["node-name"] for node in answers[-1]}
    return {
        disk.target: tuple(files[str(image.path)] for image in disk.chain)
        for disk in disks
        if nodes.has_node(disk)
    }


MISTAKES = {
    "detection on -blockdev": {"on_blockdev": lambda *_: False},
    "by file name": {"detect_nodes": by_file_name},
    "by file name on -blockdev": {
        "on_blockdev": lambda *_: False,
        "detect_nodes": by_file_name,
    },
}


@pytest.mark.scenario("a mistake in the finding of nodes turns the row above red")
@pytest.mark.parametrize(
    ("mistake", "started"),
    [
        (mistake, started)
        for mistake in MISTAKES
        for started in STARTED
        if started.endswith("-blockdev") == mistake.endswith("-blockdev")
    ],
)
def test_a_mistake_in_the_finding_of_nodes_does_not_go_unnoticed(
    mistake: str,
    started: str,
    stacks: Stacks,
    make_vm_on: MakeMachine,
    cell: Cell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check above is worth something: it fails when ckptmgr makes these mistakes."""
    name = started.partition(" ")[0]
    cell.of(stack=started if name == "debian11" else name, engine=MONITOR)
    machine = with_every_bus(started, stacks, make_vm_on)
    tracked = Tracked(stacks(name), machine, MONITOR)
    for function, mistaken in MISTAKES[mistake].items():
        monkeypatch.setattr(nodes, function, mistaken)
    with pytest.raises((AssertionError, NodeUnknown)):
        check_nodes(tracked)


@pytest.mark.scenario("libvirt's own checkpoints, with incremental-backup added")
@pytest.mark.parametrize(
    ("removed", "engine", "why"),
    [
        ("", LIBVIRT, "the domain's <qemu:capabilities> adds incremental-backup"),
        (
            "blockdev",
            MONITOR,
            "its disks are on -drive, and libvirt makes checkpoints on -blockdev only",
        ),
    ],
    ids=["-blockdev", "-drive"],
)
def test_a_capability_added_by_the_domain_counts_on_blockdev_only(
    removed: str,
    engine: EngineName,
    why: str,
    debian11: Stack,
    make_vm_on: MakeMachine,
    cell: Cell,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = capabilities(add="incremental-backup", remove=removed)
    machine = make_vm_on(debian11, EVERY_BUS, capabilities=changes)
    tracked = Tracked(debian11, machine)
    cell.of(stack=f"debian11 {'-drive' if removed else '-blockdev'}")
    cell.chose(engine)
    with caplog.at_level("INFO", logger="ckptmgr"):
        created = [tracked.create("c0")]
    assert f"engine {engine}: {why}" in caplog.messages
    tracked.write(0)
    created.append(tracked.create("c1"))
    tracked.write(1)
    created.append(tracked.create("c2"))
    tracked.write(2)
    assert {each.engine for each in created} == {engine}
    assert tracked.known() == ({"c0": None, "c1": "c0", "c2": "c1"} if engine is LIBVIRT else {})
    check_history(tracked, "c0", "c1", "c2")
    tracked.domain.delete("c1")
    check_history(tracked, "c0", "c2")
    tracked.domain.delete("c0", children=True)
    assert tracked.known() == {}
    assert not any(bitmaps(machine, target) for target in machine.images)
