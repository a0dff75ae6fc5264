"""The command line as a process: what it prints, its JSON, its exit status, on a real machine."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.command import CommandLine
from integration.evidence import bitmaps, known, on_tops, unchanged
from integration.stand import MIB, Daemon, DiskSpec, Machine, rounded

DISKS = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2",), cluster_size=4096),
    DiskSpec("vdc", format="raw"),
)
TRACKED = {"vda", "vdb"}
NAME = "web <\"server\"> & 'größe' $(id)"


@pytest.fixture(scope="module")
def machine(daemon: Daemon) -> Iterator[Machine]:
    machine = Machine(daemon, DISKS, name=NAME)
    yield machine
    machine.destroy()


@pytest.fixture
def ours(machine: Machine, daemon: Daemon, tmp_path: Path) -> Iterator[CommandLine]:
    command = CommandLine(daemon, tmp_path / "store")
    yield command
    for name in command.ok("list", NAME, "--name", "--topological").split()[:1]:
        command.ok("delete", NAME, name, "--children")


def test_the_whole_round(machine: Machine, ours: CommandLine, tmp_path: Path) -> None:
    machine.writes = {target: [] for target in machine.writes}
    ran = ours("create", NAME, "c0", "--description", "the first")
    assert (ran.status, ran.out) == (0, "c0\n")
    assert "vdc" in ran.err  # left out, with the reason
    assert "raw" in ran.err
    machine.write("vda", 1_000_001, 70_000)
    machine.write("vdb", 4_095, 2)
    created = ours.json("create", NAME, "c1")
    machine.write("vda", 5 * MIB, 1)
    assert ours.ok("create", NAME, "c2") == "c2\n"
    machine.write("vdb", 7 * MIB, 1)

    # create, show, current and parent: the same document
    assert list(created) == [
        "name", "domain", "parent", "children", "current", "created", "description", "engine",
        "disks",
    ]  # fmt: skip
    assert created["domain"] == {"name": NAME, "uuid": machine.domain.UUIDString()}
    assert (created["name"], created["parent"], created["children"]) == ("c1", "c0", [])
    assert created["current"] is True
    assert created["engine"] == "libvirt"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", created["created"])
    shown = ours.json("show", NAME, "c1", "--size")
    assert (shown["current"], shown["children"]) == (False, ["c2"])
    disks = {disk["name"]: disk for disk in shown["disks"]}
    assert {name: disk["checkpoint"] for name, disk in disks.items()} == {
        "vda": "bitmap",
        "vdb": "bitmap",
        "vdc": "no",
    }
    assert disks["vda"]["bitmap"] == "c1"
    assert disks["vda"]["node"] == machine.node("vda")
    assert [disks[name]["granularity"] for name in ("vda", "vdb")] == [65536, 4096]
    assert [disks[name]["state"] for name in disks] == ["recording", "recording", "none"]
    assert [disks[name]["dirty_bytes"] for name in disks] == [65536, 4096, None]
    assert ours.json("current", NAME)["name"] == "c2"
    assert ours.json("parent", NAME, "c2")["name"] == "c1"
    assert ours.ok("current", NAME, "--exists") == "yes\n"

    # diff
    diff = ours.json("diff", NAME, "c0", "c1", "--extents")
    assert (diff["from"], diff["to"]) == ("c0", "c1")
    found = {disk["name"]: disk for disk in diff["disks"]}
    assert found["vda"]["extents"] == [list(each) for each in rounded([(1_000_001, 70_000)])]
    assert found["vdb"]["extents"] == [[0, 8192]]
    assert found["vda"]["dirty_bytes"] == sum(length for _, length in found["vda"]["extents"])
    assert [found[name]["known"] for name in found] == [True, True, False]
    since = ours.json("diff", NAME, "c0")
    assert since["to"] is None
    assert "extents" not in since["disks"][0]
    assert [disk["dirty_bytes"] for disk in since["disks"]] == [
        sum(length for _, length in rounded(machine.writes["vda"])),
        sum(length for _, length in rounded(machine.writes["vdb"], 4096)),
        64 * MIB,
    ]
    text = ours.ok("diff", NAME, "c0", "c1")
    assert re.search(r"vda +64 MiB +\d+ KiB", text)
    assert "no: " in text

    # list
    listed = ours.json("list", NAME)
    assert listed["current"] == "c2"
    assert [each["name"] for each in listed["checkpoints"]] == ["c0", "c1", "c2"]
    assert ours.ok("list", NAME, "--name", "--leaves") == "c2\n"
    assert ours.ok("list", NAME, "--name", "--from", "c0", "--descendants").split() == ["c1", "c2"]
    for name in ("c0", "c1", "c2"):
        assert name in ours.ok("list", NAME)
        assert name in ours.ok("list", NAME, "--tree")

    # delete, redefine, adopt
    document = tmp_path / "c2.xml"
    document.write_text(ours.ok("show", NAME, "c2", "--xml"))
    assert ours.json("show", NAME, "c2", "--xml")["xml"].strip() == document.read_text().strip()
    assert ours.ok("delete", NAME, "c1") == "c1\n"
    assert ours.json("delete", NAME, "c2", "--metadata")["deleted"] == ["c2"]
    assert known(machine) == {"c0": None}
    assert bitmaps(machine) == on_tops(machine, TRACKED, "c0", "c2")
    piped = document.read_text().replace("<parent><name>c1</name>", "<parent><name>c0</name>")
    document.write_text(re.sub(r"<name>c1</name>", "<name>c0</name>", piped))
    assert ours.ok("redefine", NAME, document, "--validate") == "c2\n"
    assert known(machine) == {"c0": None, "c2": "c0"}
    ours.daemon.virsh("checkpoint-create-as", NAME, "v0", "--diskspec", "vda")
    adopted = ours.json("adopt", NAME)
    assert [each["name"] for each in adopted["checkpoints"]] == ["v0"]
    assert ours.ok("delete", NAME, "c0", "--children-only").split() == ["c2", "v0"]
    assert ours.ok("delete", NAME, "c0").split() == ["c0"]
    assert bitmaps(machine) == set()
    assert ours("current", NAME).status == 3
    ran = ours("current", NAME, "--exists")
    assert (ran.status, ran.out) == (3, "no\n")


def test_a_domain_goes_by_name_uuid_and_id(machine: Machine, ours: CommandLine) -> None:
    ours.ok("create", NAME, "c0")
    for key in (NAME, machine.domain.UUIDString(), str(machine.domain.ID())):
        assert ours.ok("list", key, "--name") == "c0\n"


def test_a_name_is_made_of_the_time(machine: Machine, ours: CommandLine) -> None:
    before = int(time.time())
    names = [ours.ok("create", NAME).strip() for _ in range(2)]
    assert len(set(names)) == 2
    assert all(before <= int(name) <= time.time() + 2 for name in names)
    assert ours.ok("current", NAME).strip() == names[1]


def test_dry_runs_show_the_plan_and_change_nothing(
    machine: Machine, ours: CommandLine, tmp_path: Path
) -> None:
    for name in ("c0", "c1"):
        ours.ok("create", NAME, name)
    document = tmp_path / "c1.xml"
    document.write_text(ours.ok("show", NAME, "c1", "--xml"))
    ours.daemon.virsh("checkpoint-create-as", NAME, "v0", "--diskspec", "vda")
    with unchanged(machine, tmp_path / "store"):
        for engine in ("libvirt", "monitor"):
            for command in (
                ("create", NAME, "c2", "--engine", engine),
                ("delete", NAME, "c0", "--engine", engine),
                ("delete", NAME, "c0", "--children", "--metadata", "--engine", engine),
                ("redefine", NAME, document, "--engine", engine),
            ):
                plan = ours.json(*command, "--dry-run")
                assert plan["dry_run"] is True
                assert plan["steps"], command
        text = ours.ok("create", NAME, "c2", "--dry-run")
        assert "Nothing was done" in text
        assert "libvirt: begin a pull backup job" in text
        assert "v0" in ours.ok("adopt", NAME, "--dry-run")
    ours.ok("adopt", NAME)


def test_engine_and_reason_are_told_with_v_and_warnings_not_with_q(
    machine: Machine, ours: CommandLine
) -> None:
    said = ours("-v", "create", NAME, "c0").err
    assert "engine libvirt" in said
    assert "supports checkpoints" in said
    assert ours("-q", "create", NAME, "c1").err == ""
    said = ours("create", NAME, "c2", "--engine", "monitor").err
    assert "taint" in said
    assert ours.json("show", NAME, "c2", "--engine", "monitor")["engine"] == "monitor"


def test_a_stopped_machine(daemon: Daemon, tmp_path: Path) -> None:
    machine = Machine(daemon, DISKS, state="stopped")
    ours = CommandLine(daemon, tmp_path)
    try:
        ran = ours("-v", "create", machine.name, "c0")
        assert ran.status == 0
        assert "engine offline" in ran.err
        machine.write("vda", 3 * MIB, 1)
        assert ours.ok("create", machine.name, "c1") == "c1\n"
        diff = ours.json("diff", machine.name, "c0", "c1", "--extents")
        assert diff["disks"][0]["extents"] == [[3 * MIB, 65536]]
        ran = ours("--json", "--engine", "libvirt", "create", machine.name, "c2")
        assert (ran.status, ran.json["error"]["code"]) == (6, "unsupported")
        assert ours.ok("delete", machine.name, "c0", "--children").split() == ["c0", "c1"]
        assert bitmaps(machine) == set()
    finally:
        machine.destroy()
