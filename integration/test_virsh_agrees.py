"""With the libvirt engine, virsh shows the same checkpoints as we do."""

from __future__ import annotations

import re
import time
from pathlib import Path

import libvirt
import pytest
from lxml import etree

import ckptmgr
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.evidence import DISKS, domain_of
from integration.stand import Daemon, Machine

THREE = DISKS[:3]


def tree(text: str) -> dict[str, str | None]:
    """Parents by name, from the tree that virsh draws with indentation."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.search(r"[\w.-]*[a-zA-Z0-9][\w.-]*", line)
        if found is None:
            continue
        while above and above[-1][0] >= found.start():
            above.pop()
        parents[found.group()] = above[-1][1] if above else None
        above.append((found.start(), found.group()))
    return parents


def canonical(document: str) -> tuple[dict[str, str | None], list[dict[str, str]], list[str]]:
    """What a checkpoint's document says: its own facts, its disks, the disks of its domain.

    The rest of the domain we keep in the form that migrates, which leaves out what every machine
    of its type has.
    """
    root = etree.fromstring(document)
    facts = {
        tag: root.findtext(tag) for tag in ("name", "description", "creationTime", "parent/name")
    }
    disks = [{str(k): str(v) for k, v in disk.items()} for disk in root.iterfind("disks/disk")]
    facts |= {f"domain's {tag}": root.findtext(f"domain/{tag}") for tag in ("name", "uuid")}
    devices = [
        etree.canonicalize(etree.tostring(disk, encoding="unicode"), strip_text=True)
        for disk in root.iterfind("domain/devices/disk")
    ]
    return facts, disks, devices


def names_of(view: ckptmgr.ListView) -> list[str]:
    return [checkpoint.name for checkpoint in view.checkpoints]


def assert_agrees(machine: Machine, store: Path, *names: str) -> None:
    """Lists, trees, documents and parents, of a line of checkpoints."""
    virsh = machine.stand.virsh
    domain = domain_of(machine, store)
    parents: dict[str, str | None] = dict(zip(names, (None, *names), strict=False))
    assert virsh("checkpoint-list", machine.name, "--name").split() == list(names)
    assert tree(virsh("checkpoint-list", machine.name, "--tree")) == parents
    listed = domain.checkpoints()
    assert {checkpoint.name: checkpoint.parent for checkpoint in listed.checkpoints} == parents
    assert names_of(listed) == list(names)
    assert listed.current == names[-1]
    for name in names:
        theirs = virsh("checkpoint-dumpxml", machine.name, name)
        assert canonical(domain.document(name)) == canonical(theirs)


def test_virsh_agrees_also_after_deletions_and_restarts_of_the_daemon(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine, ours = make_vm_on(daemon, THREE), CommandLine(daemon, tmp_path)
    for number in range(4):
        about = f"number <{number}> & 'so'"
        ours.ok("create", machine.name, f"c{number}", "--description", about)
    assert_agrees(machine, tmp_path, "c0", "c1", "c2", "c3")
    drawn = ours.ok("list", machine.name, "--tree")
    assert re.findall(r"\bc\d\b", drawn) == ["c0", "c1", "c2", "c3"]
    shown = ours.ok("show", machine.name, "c2", "--xml")
    assert canonical(shown) == canonical(daemon.virsh("checkpoint-dumpxml", machine.name, "c2"))
    ours.ok("delete", machine.name, "c1")
    assert_agrees(machine, tmp_path, "c0", "c2", "c3")
    ours.ok("delete", machine.name, "c3")
    assert_agrees(machine, tmp_path, "c0", "c2")

    daemon.stop()
    daemon.start()
    machine.domain = daemon.handle.lookupByName(machine.name)
    assert_agrees(machine, tmp_path, "c0", "c2")
    ours.ok("create", machine.name, "c4")
    assert_agrees(machine, tmp_path, "c0", "c2", "c4")
    assert ours.ok("parent", machine.name, "c4") == "c2\n"
    assert daemon.virsh("checkpoint-parent", machine.name, "c4").split() == ["c2"]


def test_the_time_is_the_one_that_libvirt_has(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take the time for themselves, and a create can be slow."""
    machine = make_vm_on(daemon, THREE[:1])
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    view = domain_of(machine, tmp_path).create("c0")
    theirs = canonical(daemon.virsh("checkpoint-dumpxml", machine.name, "c0"))[0]
    assert str(view.created) == theirs["creationTime"]


def test_lists_are_chosen_as_virsh_chooses_them(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm_on(daemon, THREE[:1])
    domain = domain_of(machine, tmp_path)
    for name in ("b", "A", "c"):
        domain.create(name)
    for options, asked in (
        ((), domain.checkpoints()),
        (("--roots",), domain.checkpoints(roots=True)),
        (("--leaves",), domain.checkpoints(leaves=True)),
        (("--no-leaves",), domain.checkpoints(leaves=False)),
        (("--topological",), domain.checkpoints(topological=True)),
        (("--from", "b"), domain.checkpoints(start="b")),
        (("--from", "b", "--descendants"), domain.checkpoints(start="b", descendants=True)),
        (("--from", "c"), domain.checkpoints(start="c")),
    ):
        theirs = daemon.virsh("checkpoint-list", machine.name, "--name", *options).split()
        assert names_of(asked) == theirs, options


def test_sizes_are_those_of_libvirt(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm_on(daemon, THREE)
    domain = domain_of(machine, tmp_path)
    domain.create("c0")
    machine.write("vda", 100_000, 200_000)
    machine.write("vdb", 4095, 2)
    theirs = machine.domain.checkpointLookupByName("c0").getXMLDesc(
        libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
    )
    disks = canonical(domain.document("c0", size=True))[1]
    assert disks == canonical(theirs)[1]
    assert [disk.get("size") for disk in disks] == ["262144", "8192", None]


def test_a_parent_that_libvirt_got_wrong_is_put_right(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """libvirt keeps its current checkpoint in memory alone; two leaves leave it none at all."""
    machine, ours = make_vm_on(daemon, THREE[:1]), CommandLine(daemon, tmp_path)
    for name in ("c0", "c1"):
        ours.ok("create", machine.name, name)
    # a second leaf under c0, as a revert of another tool leaves it
    stray = daemon.virsh("checkpoint-dumpxml", machine.name, "c1")
    for what in ("<name>{}</name>", "bitmap='{}'"):
        stray = stray.replace(what.format("c1"), what.format("stray"))
    machine.domain.checkpointCreateXML(stray, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
    daemon.stop()
    daemon.start()
    machine.domain = daemon.handle.lookupByName(machine.name)
    ours.ok("create", machine.name, "c2")
    assert ours.ok("parent", machine.name, "c2").strip() == "c1"
    assert daemon.virsh("checkpoint-parent", machine.name, "c2").strip() == "c1"
