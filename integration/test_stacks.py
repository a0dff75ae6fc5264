"""The same promises on three generations of libvirt and QEMU."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import libvirt
import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.domain import nodes
from ckptmgr.domain.disk import Disk
from ckptmgr.errors import NodeUnknown, Unsupported
from integration.conftest import MakeMachine
from integration.stacks import RELEASES, Stack, build
from integration.stacks.__main__ import NAMES
from integration.stacks.fixtures import Stacks
from integration.stacks.remote import free_port
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Guest, Machine, rounded
from integration.stand.accel import domain_type
from integration.traces import holding, naming
from integration.tracked import Tracked

LIBVIRT, MONITOR, OFFLINE = EngineName.LIBVIRT, EngineName.MONITOR, EngineName.OFFLINE

DISKS = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2", "raw")),
    DiskSpec("vdc", format="raw"),
)

EVERY_BUS = (
    DiskSpec("hda", device="cdrom", format="raw", empty=True, read_only=True),
    DiskSpec("sda"),
    DiskSpec("sdb", bus="sata"),
    DiskSpec("vda", backing=("qcow2", "raw")),
    DiskSpec("vdb", format="raw"),
)


def capabilities(*, add: str = "", remove: str = "") -> str:
    """A domain's element that adds or removes a capability of QEMU, as libvirt sees it."""
    changes = [("add", add), ("del", remove)]
    inner = "".join(f"<qemu:{verb} capability='{name}'/>" for verb, name in changes if name)
    return f"<qemu:capabilities>{inner}</qemu:capabilities>"


def fitting(stack: Stack) -> EngineName:
    """The engine that has to be chosen for a running domain."""
    return MONITOR if stack.kind == "debian11" else LIBVIRT


# --- create, diff, delete ------------------------------------------------------------------------


@pytest.mark.scenario("create, diff, delete")
@pytest.mark.parametrize("engine", ["auto", *EngineName])
def test_every_diff_is_what_was_written(
    engine: str, stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    asked = None if engine == "auto" else EngineName(engine)
    machine = make_vm_on(stack, DISKS, state="stopped" if asked is OFFLINE else "paused")
    tracked = Tracked(stack, machine, asked)
    if asked is LIBVIRT and fitting(stack) is MONITOR:
        with pytest.raises(Unsupported, match="engine 'libvirt' cannot work on domain") as refusal:
            tracked.create("c0")
        assert tracked.names() == []
        cell.refused(refusal.value.message)
        return
    used = asked or fitting(stack)
    if asked is None:
        cell.chose(used)
    for number in range(5):
        tracked.write(2 * number)
        assert tracked.create(f"c{number}").engine is used
        tracked.write(2 * number + 1)

    def expected(start: str, end: str | None = None) -> dict[str, Any]:
        written: dict[str, Any] = tracked.written(start, end)
        return written if used is MONITOR else {**written, "vdc": None}

    def check(*names: str) -> None:
        assert tracked.names() == list(names)
        for start, end in zip(names, [*names[1:], None], strict=True):
            assert tracked.shown(start, end) == expected(start, end)
        assert tracked.shown(names[0]) == expected(names[0])
        assert machine.bitmaps("vda").keys() == set(names)

    check("c0", "c1", "c2", "c3", "c4")
    for gone, left in (("c2", "0134"), ("c0", "134"), ("c4", "13")):
        assert tracked.domain.delete(gone) == (gone,)
        check(*(f"c{number}" for number in left))
    assert tracked.create("c5").parent == "c3"
    tracked.write(99)
    check("c1", "c3", "c5")


@pytest.mark.scenario("which engine, and why")
def test_the_engine_that_fits_is_chosen_and_the_reason_given(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    tracked = Tracked(stack, make_vm_on(stack))
    with caplog.at_level("INFO", logger="ckptmgr"):
        chosen = tracked.create("c0").engine
    cell.chose(chosen)
    assert chosen is fitting(stack)
    why = {
        LIBVIRT: "engine libvirt: libvirt supports checkpoints of this domain",
        MONITOR: "engine monitor: libvirt does not support checkpoints with this domain's QEMU",
    }
    assert why[chosen] in caplog.messages


# --- which node is which disk's ------------------------------------------------------------------


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
    elements = capabilities(remove="blockdev") if how == "-drive" else ""
    return make_vm_on(stack, (*EVERY_BUS, *overlays), elements=elements)


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


# --- Debian 11: libvirt's own checkpoints where the domain asks for them -------------------------


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
    elements = capabilities(add="incremental-backup", remove=removed)
    machine = make_vm_on(debian11, EVERY_BUS, elements=elements)
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


# --- what happens to domains ---------------------------------------------------------------------


def check_history(tracked: Tracked, *names: str) -> None:
    """Each interval, and the whole, are what was written; unknown only where nobody tracks."""
    assert tracked.names() == list(names)
    last = tracked.domain.checkpoint(names[-1])
    untracked = {disk.name: None for disk in last.disks if disk.bitmap is None}
    untracked.pop("hda", None)
    for start, end in [*itertools.pairwise(names), (names[0], None), (names[-1], None)]:
        assert tracked.shown(start, end) == {**tracked.written(start, end), **untracked}


def two_checkpoints(tracked: Tracked) -> None:
    """c0 and c1, with writes before, between and after."""
    for number in range(2):
        tracked.write(2 * number)
        tracked.create(f"c{number}")
        tracked.write(2 * number + 1)


def made_whole(tracked: Tracked, *line: str, also: Sequence[str] = ()) -> None:
    """Nothing is wrong but what libvirt has forgotten, which is given back to it; and `also`."""
    tells = fitting(tracked.stack) is LIBVIRT
    forgotten = tells and tracked.known().keys() != set(line)
    assert tracked.problems() == [*also, *(["store-only"] if forgotten else [])]
    tracked.domain.repair()
    assert tracked.problems() == []
    if tells:
        assert tracked.known() == dict(zip(line, [None, *line], strict=False))
    check_history(tracked, *line)


def and_a_third(tracked: Tracked, *, also: Sequence[str] = ()) -> None:
    """The history goes on as if nothing had happened.

    also -- what check finds first, and is to be cured
    """
    check_history(tracked, "c0", "c1")
    made_whole(tracked, "c0", "c1", also=also)
    tracked.write(10)
    assert tracked.create("c2").parent == "c1"
    tracked.write(11)
    check_history(tracked, "c0", "c1", "c2")
    if fitting(tracked.stack) is LIBVIRT:
        assert tracked.known()["c2"] == "c1"
    for name in ("c1", "c0"):
        tracked.domain.delete(name)
    assert tracked.shown("c2") == {**tracked.written("c2")}
    assert tracked.problems() == []


QCOW2 = DISKS[:2]


@pytest.mark.scenario("libvirtd restarted under a running VM")
@pytest.mark.parametrize("kill", [False, True], ids=["ended", "killed"])
def test_history_goes_on_after_a_restart_of_libvirtd(
    kill: bool, stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    tracked = Tracked(stack, make_vm_on(stack, QCOW2))
    two_checkpoints(tracked)
    pid = tracked.machine.pid
    stack.stop(kill=kill)
    stack.start()
    tracked.move(stack)
    assert tracked.machine.pid == pid
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("undefined and defined again")
def test_history_goes_on_in_a_domain_that_is_defined_again(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.stop()
    definition = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    machine.domain = stack.handle.defineXML(definition)
    assert tracked.known() == {}
    check_history(tracked, "c0", "c1")  # stopped, from the images
    machine.start()
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("renamed, libvirtd restarted")
def test_history_goes_on_in_a_domain_that_was_renamed(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.stop()
    machine.name = f"{machine.name}-renamed"
    machine.domain.rename(machine.name)
    stack.stop()
    stack.start()
    tracked.move(stack)
    assert tracked.known() == {}  # libvirt's own bug, 7.0 to 11.3: the files are in a wrong folder
    machine.start()
    cell.chose(fitting(stack))
    and_a_third(tracked, also=["renamed"])


@pytest.mark.scenario("transient domain, ended and started again")
def test_a_transient_domain_has_its_history_again_when_it_is_started_again(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2, transient=True)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    documents = [tracked.domain.document(name) for name in ("c0", "c1")]
    same = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.stop()
    machine.domain = stack.handle.createXML(same, libvirt.VIR_DOMAIN_START_PAUSED)
    stack.workspace.record(machine.pid)
    assert tracked.known() == {}
    for document in documents:
        tracked.domain.redefine(document, validate=True)
    if fitting(stack) is LIBVIRT:
        assert tracked.known() == {"c0": None, "c1": "c0"}
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("cold move, by dumpxml and define")
@pytest.mark.parametrize(("source", "target"), [("debian11", "debian12"), ("debian12", "debian13")])
def test_history_goes_on_where_the_domain_is_defined_anew(
    source: str, target: str, stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stacks(source), QCOW2)
    tracked = Tracked(stacks(source), machine)
    two_checkpoints(tracked)
    machine.stop()
    definition = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    stacks(target).handle.defineXML(definition)
    tracked.move(stacks(target))
    machine.start()
    cell.of(stack=f"{source} to {target}")
    cell.chose(fitting(stacks(target)))
    and_a_third(tracked)


# --- live migration ------------------------------------------------------------------------------


def migrate(tracked: Tracked, target: Stack, xml: str | None = None) -> None:
    """Live migration with shared storage, to another libvirt of this machine.

    xml -- of the domain there, where it is not to be the same
    """
    machine = tracked.machine
    flags = (
        libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PERSIST_DEST
        | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        # both ends have the images in one page cache
        | libvirt.VIR_MIGRATE_UNSAFE
    )
    # Not the port that libvirt would choose: that may be the choice of another one's as well.
    where = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://127.0.0.1:{free_port()}"}
    if xml is not None:
        where[libvirt.VIR_MIGRATE_PARAM_DEST_XML] = xml
    machine.domain.migrate3(target.handle, where, flags)
    tracked.move(target)
    target.workspace.record(machine.pid)


@pytest.mark.scenario("live migration and back")
@pytest.mark.parametrize(
    ("source", "target", "back"),
    [("debian12", "debian13", "debian12"), ("debian11", "debian12", "debian13")],
)
def test_history_travels_with_a_live_migration(
    source: str, target: str, back: str, stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    cell.of(stack=f"{source} to {target} to {back}")
    cell.chose(LIBVIRT)
    tracked = Tracked(stacks(source), make_vm_on(stacks(source), QCOW2, state="running"))
    two_checkpoints(tracked)
    migrate(tracked, stacks(target))
    assert tracked.known() == {}
    marker = tracked.domain.adapter.marker()
    assert marker is not None
    assert marker.checkpoint == "c1"
    tracked.write(20)
    assert tracked.create("c2").parent == "c1"
    assert tracked.known() == {"c1": None, "c2": "c1"}
    check_history(tracked, "c0", "c1", "c2")
    tracked.write(21)
    check_history(tracked, "c0", "c1", "c2")
    made_whole(tracked, "c0", "c1", "c2")
    migrate(tracked, stacks(back))
    assert tracked.known() == {}
    check_history(tracked, "c0", "c1", "c2")
    made_whole(tracked, "c0", "c1", "c2")
    assert tracked.create("c3").parent == "c2"
    tracked.write(22)
    check_history(tracked, "c0", "c1", "c2", "c3")
    for name in ("c1", "c3", "c0"):
        tracked.domain.delete(name)
    check_history(tracked, "c2")
    assert tracked.machine.bitmaps("vda").keys() == {"c2"}
    assert tracked.problems() == []


@pytest.mark.scenario("live migration and back, a Linux guest writing meanwhile")
def test_what_a_guest_writes_while_it_is_migrated_is_in_the_difference(
    stacks: Stacks, cell: Cell
) -> None:
    """It writes 4 KiB after 4 KiB without a pause: each interval is one range, none between."""
    cell.of(stack="debian12 to debian13 to debian12")
    cell.chose(LIBVIRT)
    step, granularity = 4096, 65536
    with Guest(stacks("debian12"), (DiskSpec("vda"),)) as guest:
        tracked = Tracked(stacks("debian12"), guest.machine)
        tracked.create("c0")
        guest.shell.churn("vda", step, 16000)
        guest.shell.wait_churned(20)
        before = guest.shell.churned[-1]
        tracked.create("c1")
        after = guest.shell.churned[-1] + 1
        guest.shell.wait_churned(after + 20)
        port = "port"
        for name in ("debian13", "debian12"):
            # the QEMU that ends removes the socket that it has bound
            xml = guest.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
            xml = xml.replace(f"/{port}'", f"/on-{name}'")
            port = f"on-{name}"
            migrate(tracked, stacks(name), xml)
            reached = guest.shell.churned[-1]
            guest.reconnect(port=port, churning=True)
            guest.shell.wait_churned(reached + 20)
            assert tracked.known() == {}
            assert tracked.problems() == ["store-only"]
            tracked.domain.repair()
            assert tracked.known() == {"c0": None, "c1": "c0"}
            assert tracked.problems() == []
        guest.shell.stop_churn()
        last = guest.shell.churned[-1]
        (first,) = tracked.shown("c0", "c1")["vda"] or []
        (second,) = tracked.shown("c1")["vda"] or []
    cut, begun = sum(first) // granularity - 1, second[0] // granularity
    assert first[0] == 0
    assert before * step // granularity <= cut <= after * step // granularity
    assert begun in (cut, cut + 1)
    assert sum(second) // granularity - 1 == last * step // granularity


@pytest.mark.scenario("live migration, a raw disk's bitmaps stay behind")
def test_a_raw_disk_is_unknown_after_a_live_migration_and_the_others_are_not(
    stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    cell.of(stack="debian12 to debian13", engine=MONITOR)
    machine = make_vm_on(stacks("debian12"), DISKS, state="running")
    tracked = Tracked(stacks("debian12"), machine, MONITOR)
    two_checkpoints(tracked)
    migrate(tracked, stacks("debian13"))
    assert tracked.shown("c0", "c1") == tracked.written("c0", "c1")
    assert tracked.shown("c1") == {**tracked.written("c1"), "vdc": None}
    tracked.write(20)
    tracked.create("c2")
    tracked.write(21)
    assert tracked.shown("c1", "c2") == {**tracked.written("c1", "c2"), "vdc": None}
    assert tracked.shown("c2") == tracked.written("c2")


# --- one disk or the other -----------------------------------------------------------------------


@pytest.mark.scenario("a disk grown, one plugged in, one unplugged and another put in its place")
def test_each_disk_is_judged_on_its_own(stack: Stack, make_vm_on: MakeMachine, cell: Cell) -> None:
    machine = make_vm_on(stack, (DiskSpec("vda"), DiskSpec("vdb")))
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.domain.blockResize("vdb", 80 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    plug(machine, "vdc", DiskSpec("vdc"))
    machine.write("vda", 40 * MIB, MIB)
    machine.write("vdb", 70 * MIB, MIB)
    now = tracked.shown("c1")
    assert now["vda"] == tracked.written("c1")["vda"]
    assert now["vdc"] is None
    # what was not there when the interval began counts as written
    grown = [*tracked.written("c1")["vdb"], (64 * MIB, 16 * MIB)]
    assert now["vdb"] == rounded(grown, 65536, 80 * MIB)
    tracked.create("c2")
    machine.write("vda", 50 * MIB, MIB)
    unplug(machine, "vdc")
    plug(machine, "vdc", DiskSpec("vdx"))
    assert tracked.shown("c1", "c2") == now
    later = tracked.shown("c2")
    assert later["vda"] == tracked.written("c2")["vda"]
    assert later["vdb"] == []
    assert later["vdc"] is None
    # only the disk that was put in another's place is worth a cure
    assert tracked.problems() == ["disk-replaced"]
    tracked.domain.repair()
    assert tracked.problems() == []
    assert tracked.shown("c1", "c2") == now
    cell.chose(fitting(stack))


def unplug(machine: Machine, target: str) -> None:
    """Take a disk out of a running machine."""
    (alias,) = re.findall(
        rf"<target dev='{target}' .*?<alias name='(.*?)'/>", machine.domain.XMLDesc(), re.DOTALL
    )
    machine.domain.detachDeviceAlias(alias)
    # no guest answers; QEMU takes it out at the next reset
    machine.domain.reset()
    deadline = time.monotonic() + 10
    while f"'{target}'" in machine.domain.XMLDesc():
        assert time.monotonic() < deadline, f"{target} is still there"
        time.sleep(0.05)


def plug(machine: Machine, target: str, disk: DiskSpec) -> None:
    """Put a new disk into a running machine as `target`."""
    image = disk.make(machine.folder)
    machine.domain.attachDevice(
        f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}'/>"
        f"<source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
    )


# --- no trace ------------------------------------------------------------------------------------


@pytest.mark.scenario("one path inside and out, no /dev/kvm that does not work")
def test_a_stack_has_our_folders_where_we_have_them_and_leaves_its_release_alone(
    stack: Stack, tmp_path: Path
) -> None:
    def inside(*command: str) -> bool:
        return subprocess.run(stack.inside(*command), check=False).returncode == 0

    (tmp_path / "out").touch()
    assert inside("mv", f"{tmp_path}/out", f"{tmp_path}/in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert inside("test", "-e", "/dev/kvm") == (domain_type() == "kvm")
    assert inside("touch", "/usr/written")
    assert not (build(stack.kind) / "usr/written").exists()


@pytest.mark.scenario("killed, it leaves no trace")
def test_a_stack_ends_with_the_process_that_started_it_however_that_ends(
    stacks: Stacks, cell: Cell
) -> None:
    cell.of(stack="debian12")
    parent = stacks("debian12").workspace.folder("p")
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from integration.stacks import Stack
        from integration.stand import Machine, Workspace
        workspace = Workspace(Path({str(parent)!r}))
        stack = Stack(workspace, "debian12")
        print(stack.pid, Machine(stack).pid, workspace.path, flush=True)
        time.sleep(60)
        """
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        *pids, folder = run.stdout.readline().split()
        namespace = Path(f"/proc/{pids[0]}/ns/mnt").readlink()
        assert len(holding(namespace)) >= 3  # process 1, libvirtd, QEMU
        assert (Path(folder) / "s1/run/libvirt-sock").is_socket()
    finally:
        run.kill()
        run.communicate()
    deadline = time.monotonic() + 60
    while left := [*holding(namespace), *naming(Path(folder)), *parent.iterdir()]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)
    assert folder not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.scenario("one command starts it, ^C leaves no trace")
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_started_and_ended_by_one_command(
    name: str, stacks: Stacks, tmp_path: Path, cell: Cell
) -> None:
    cell.of(stack=name)
    if name in RELEASES:
        stacks(name)  # to be built in this test's time is not what is meant here
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "integration.stacks", "start", name]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert run.stdout is not None
        uri = run.stdout.readline().split()[2]
        assert run.stdout.readline().split()[-1].startswith(str(tmp_path))
        line = run.stdout.readline()
        if name != "embedded":
            settings = Path(line.rpartition("CKPTMGR_CONFIG=")[2].strip()).read_text()
            assert Path(settings.split('"')[1]).is_dir()
            line = run.stdout.readline()
        assert line == "ends with ^C\n"
        mounts = Path(f"/proc/{run.pid}/ns/mnt").readlink()
        nodes = ["virsh", "-c", uri, "version"]
        printed = subprocess.run(nodes, check=True, capture_output=True, text=True).stdout
        assert "Running hypervisor: QEMU" in printed
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate()
    assert run.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert naming(tmp_path) == holding(mounts) == []
    assert str(tmp_path) not in Path("/proc/net/unix").read_text()
