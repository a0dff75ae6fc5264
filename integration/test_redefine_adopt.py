"""Checkpoints that come back from their XML, and checkpoints that other tools made."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.evidence import (
    DISKS,
    Timeline,
    bitmaps,
    domain_of,
    has_checkpoints,
    known,
    on_tops,
    told,
    unchanged,
)
from integration.stand import Daemon, DiskSpec

TWO = (DISKS[0], DISKS[1])
TRACKED = {"vda", "vdb"}


@pytest.mark.parametrize("engine", ["libvirt", "monitor", "offline"])
def test_redefined_after_its_metadata_was_deleted(
    engine: str, make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(TWO, state="stopped" if engine == "offline" else "paused")
    domain, timeline = domain_of(machine, tmp_path, engine), Timeline(machine)
    for name in ("c0", "c1"):
        domain.create(name, description=f"about {name}")
        timeline.cut(name)
        timeline.scatter()
    views = [domain.checkpoint(name) for name in ("c0", "c1")]
    documents = [domain.document(name) for name in ("c0", "c1")]
    domain.delete("c0", children=True, metadata=True)
    assert known(machine) == {}
    assert bitmaps(machine) == on_tops(machine, TRACKED, "c0", "c1")

    for document in documents:
        domain.redefine(document, validate=machine.active or not has_checkpoints(machine))
    assert known(machine) == told(machine, {"c0": None, "c1": "c0"})
    assert domain.checkpoints().current == "c1"
    for before in views:
        after = domain.checkpoint(before.name)
        for fact in ("parent", "children", "current", "created", "description"):
            assert getattr(after, fact) == getattr(before, fact), fact
        assert {disk.state for disk in after.disks} == {ckptmgr.State.RECORDING}
    # the bitmaps went on recording; what was between, only the store knew
    timeline.check(domain, "c0", None, TRACKED)
    timeline.check(domain, "c1", None, TRACKED)
    between = domain.diff("c0", "c1")
    assert [disk.known for disk in between.disks] == [False, False]
    assert all("redefined" in str(disk.reason) for disk in between.disks)
    domain.create("c2")
    timeline.cut("c2")
    timeline.scatter()
    timeline.check(domain, "c1", "c2", TRACKED)
    timeline.check(domain, "c2", None, TRACKED)


def test_redefining_a_known_checkpoint_changes_its_description_alone(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(TWO)
    domain, timeline = domain_of(machine, tmp_path), Timeline(machine)
    for name in ("c0", "c1"):
        timeline.write("vda", 1_000_000, 1)
        domain.create(name, description="old")
        timeline.cut(name)
    document = domain.document("c1").replace(">old<", ">new &amp; better<")
    assert domain.redefine(document).description == "new & better"
    if has_checkpoints(machine):
        assert "new &amp; better" in machine.domain.checkpointLookupByName("c1").getXMLDesc()
    timeline.check(domain, "c0", "c1", TRACKED)
    with unchanged(machine, tmp_path), pytest.raises(ckptmgr.CheckpointExists):
        domain.redefine(document.replace("<parent>", "<!--").replace("</parent>", "-->"))
    with unchanged(machine, tmp_path), pytest.raises(ckptmgr.CheckpointExists):
        domain.redefine(document.replace("checkpoint='bitmap' bitmap='c1'", "checkpoint='no'", 1))


@pytest.mark.each_release
def test_validation_refuses_a_checkpoint_whose_bitmap_is_gone(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(TWO)
    domain = domain_of(machine, tmp_path)
    domain.create("c0")
    document = domain.document("c0")
    domain.delete("c0", metadata=True)
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vdb"), name="c0")
    with unchanged(machine, tmp_path), pytest.raises(ckptmgr.CkptmgrError, match="vdb"):
        domain.redefine(document, validate=True)
    # without, it is taken for what it is
    view = domain.redefine(document)
    assert [disk.state for disk in view.disks] == [
        ckptmgr.State.RECORDING,
        ckptmgr.State.BROKEN,
    ]
    assert [disk.known for disk in domain.diff("c0").disks] == [True, False]


def test_a_parent_must_be_there_first(make_vm: MakeMachine, tmp_path: Path) -> None:
    machine = make_vm(TWO)
    domain = domain_of(machine, tmp_path)
    domain.create("c0")
    domain.create("c1")
    documents = {name: domain.document(name) for name in ("c0", "c1")}
    domain.delete("c0", children=True, metadata=True)
    with unchanged(machine, tmp_path), pytest.raises(ckptmgr.InvalidRequest, match="c0"):
        domain.redefine(documents["c1"])
    domain.redefine(documents["c0"])
    domain.redefine(documents["c1"])
    assert domain.parent("c1").name == "c0"


def test_another_domains_checkpoint_is_refused(make_vm: MakeMachine, tmp_path: Path) -> None:
    one, other = make_vm([DiskSpec()]), make_vm([DiskSpec()], state="stopped")
    domain_of(one, tmp_path / "a").create("c0")
    document = domain_of(one, tmp_path / "a").document("c0")
    with (
        unchanged(other, tmp_path / "b"),
        pytest.raises(ckptmgr.InvalidDocument, match="another domain"),
    ):
        domain_of(other, tmp_path / "b").redefine(document)


def test_adopted_from_virsh(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> None:
    machine = make_vm_on(daemon, TWO)
    domain, timeline = domain_of(machine, tmp_path), Timeline(machine)
    for name in ("v0", "v1", "v2"):
        daemon.virsh("checkpoint-create-as", machine.name, name, "--description", f"virsh's {name}")
        timeline.cut(name)
        timeline.scatter()
    assert domain.checkpoints().checkpoints == ()
    before = bitmaps(machine)
    assert [view.name for view in domain.adopt()] == ["v0", "v1", "v2"]
    assert bitmaps(machine) == before
    listed = domain.checkpoints(topological=True)
    assert [(view.name, view.parent) for view in listed.checkpoints] == [
        ("v0", None),
        ("v1", "v0"),
        ("v2", "v1"),
    ]
    assert listed.current == "v2"
    assert domain.checkpoint("v1").description == "virsh's v1"
    for name in ("v0", "v1", "v2"):
        timeline.check(domain, name, None, TRACKED)
    between = domain.diff("v0", "v2")
    assert [disk.known for disk in between.disks] == [False, False]
    assert all("another tool" in str(disk.reason) for disk in between.disks)
    # from now on every interval is known
    domain.create("c0")
    timeline.cut("c0")
    timeline.scatter()
    timeline.check(domain, "v2", "c0", TRACKED)
    timeline.check(domain, "c0", None, TRACKED)
    assert domain.delete("v1") == ("v1",)
    assert domain.diff("v0", "v2").disks[0].known is False
    timeline.check(domain, "v2", "c0", TRACKED)
    assert daemon.virsh("checkpoint-list", machine.name, "--name").split() == ["c0", "v0", "v2"]
    assert domain.adopt() == ()


@pytest.mark.each_release
def test_adopted_from_plain_libvirt_calls_between_our_own(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(TWO)
    domain, timeline = domain_of(machine, tmp_path), Timeline(machine)
    domain.create("ours")
    timeline.cut("ours")
    timeline.scatter()
    machine.domain.checkpointCreateXML(
        "<domaincheckpoint><name>theirs</name><description>just &lt;one&gt;</description>"
        "<disks><disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>"
    )
    timeline.cut("theirs")
    timeline.scatter()
    (view,) = domain.adopt()
    assert (view.name, view.parent, view.description) == ("theirs", "ours", "just <one>")
    assert [(disk.name, disk.bitmap) for disk in view.disks] == [("vda", None), ("vdb", "theirs")]
    assert view.current
    timeline.check(domain, "theirs", None, {"vdb"})
    timeline.check(domain, "ours", None, TRACKED)
    domain.create("next")
    timeline.cut("next")
    timeline.check(domain, "theirs", "next", {"vdb"})
    timeline.check(domain, "ours", "next", {"vda"})


def test_other_tools_checkpoints_are_never_touched_unasked(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(TWO)
    domain, timeline = domain_of(machine, tmp_path), Timeline(machine)
    domain.create("c0")
    timeline.cut("c0")
    machine.domain.checkpointCreateXML("<domaincheckpoint><name>theirs</name></domaincheckpoint>")
    timeline.scatter()
    domain.create("c1")
    timeline.cut("c1")
    assert domain.parent("c1").name == "c0"
    timeline.check(domain, "c0", "c1", TRACKED)
    domain.delete("c0", children=True)
    assert list(known(machine)) == ["theirs"]
    assert bitmaps(machine) == on_tops(machine, TRACKED, "theirs")
