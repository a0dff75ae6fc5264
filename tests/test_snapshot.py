"""A libvirt snapshot's XML: what of it the history needs, and nothing that is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import InvalidDocument, InvalidRequest
from ckptmgr.marker import Marker
from ckptmgr.snapshot import (
    DiskImage,
    Kind,
    check_snapshot_name,
    format_snapshot,
    parse_snapshot,
    with_state,
)
from ckptmgr.xml import parse

MARKER = "<ckptmgr:current xmlns:ckptmgr='urn:ckptmgr:1' checkpoint='c1' generation='7'/>"
DOMAIN = """
<{tag} type='kvm'><name>web</name><metadata>{marker}</metadata>
 <devices>
  <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
   <source file='/img/a.qcow2'/><target dev='vda'/></disk>
  <disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='vdb'/></disk>
  <disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda'/></disk>
  <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdc'/></disk>
  <disk type='file' device='cdrom'><target dev='sdb'/></disk>
 </devices></{tag}>
"""


def document(*, domain: str = MARKER, inactive: str | None = None, state: str = "running") -> str:
    text = (
        f"<domainsnapshot><name>s1</name><state>{state}</state>"
        "<parent><name>s0</name></parent><creationTime>1795392011</creationTime>"
        "<memory snapshot='internal'/>"
        "<disks><disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='no'/></disks>"
    )
    text += DOMAIN.format(tag="domain", marker=domain)
    if inactive is not None:
        text += DOMAIN.format(tag="inactiveDomain", marker=inactive)
    return text + "</domainsnapshot>"


def test_what_a_snapshot_says_is_read() -> None:
    found = parse_snapshot(document(), current=True)
    assert (found.name, found.created, found.state, found.parent, found.current) == (
        "s1",
        1795392011,
        "running",
        "s0",
        True,
    )
    assert found.memory is Kind.INTERNAL
    assert found.disks == (("vda", Kind.INTERNAL), ("vdb", Kind.NO))
    assert found.marker == Marker("c1", 7)
    assert found.checkpoint == "c1"
    assert found.starts
    assert not found.external


def test_the_disks_of_then_are_those_with_local_images_without_media() -> None:
    assert parse_snapshot(document()).images == (
        DiskImage("vda", "/img/a.qcow2", "qcow2"),
        DiskImage("vdb", "/dev/vg/b"),
    )


def test_a_marker_that_only_the_inactive_definition_has_counts() -> None:
    # libvirt 7.0 puts back that one
    found = parse_snapshot(document(domain="", inactive=MARKER.replace("c1", "c0")))
    assert found.checkpoint == "c0"
    found = parse_snapshot(document(inactive=MARKER.replace("c1", "c0")))
    assert found.checkpoint == "c1"


@pytest.mark.parametrize(
    "marker",
    [
        "",
        "<current checkpoint='c1' generation='7'/>",
        MARKER.replace("7", "-7"),
        MARKER.replace("c1", "../c1"),
        MARKER.replace("current", "other"),
        "<x>" + MARKER + "</x>",
    ],
)
def test_what_is_no_marker_of_ours_is_none(marker: str) -> None:
    assert parse_snapshot(document(domain=marker)).marker is None


def test_a_snapshot_in_files_of_its_own_is_external() -> None:
    text = document()
    assert parse_snapshot(
        text.replace("name='vdb' snapshot='no'", "name='vdb' snapshot='external'")
    ).external
    assert parse_snapshot(
        text.replace("<memory snapshot='internal'", "<memory snapshot='external'")
    ).external


def test_a_snapshot_without_the_domain_s_definition_says_so() -> None:
    text = "<domainsnapshot><name>s</name><creationTime>1</creationTime></domainsnapshot>"
    found = parse_snapshot(text)
    assert not found.definition
    assert found.memory is Kind.NO
    assert found.state == "unknown"
    assert parse_snapshot(document()).definition


@pytest.mark.parametrize(
    "text",
    [
        "<domainsnapshot><name>s</name></domainsnapshot>",
        "<domainsnapshot><creationTime>1</creationTime></domainsnapshot>",
        "<domainsnapshot><name>s</name><creationTime>now</creationTime></domainsnapshot>",
        "<domaincheckpoint><name>s</name><creationTime>1</creationTime></domaincheckpoint>",
        "<!DOCTYPE x [<!ENTITY e 'x'>]><domainsnapshot/>",
        "",
        "garbage",
    ],
)
def test_what_is_no_snapshot_is_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        parse_snapshot(text)


@given(st.text(max_size=300))
def test_no_text_at_all_does_more_than_be_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        parse_snapshot(text)


def test_only_a_paused_domain_s_snapshot_is_recorded_as_running() -> None:
    changed = with_state(document(state="paused"), "running")
    assert changed is not None
    before, after = parse_snapshot(document(state="paused")), parse_snapshot(changed)
    assert after.state == "running"
    assert (after.marker, after.disks) == (before.marker, before.disks)
    assert with_state(document(state="shutoff"), "running") is None


@given(st.text())
def test_names_that_are_taken_are_ones_that_a_file_can_have(name: str) -> None:
    try:
        check_snapshot_name(name)
    except InvalidRequest:
        return
    assert name
    assert "/" not in name
    assert not name.startswith(".")
    assert len(f"{name}.xml.new".encode()) < 255
    assert parse(format_snapshot(name, None)).findtext("name") == name


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a\nb", "\x00", "n" * 201, "ü" * 101])
def test_names_that_libvirt_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_snapshot_name(name)


@pytest.mark.parametrize("name", ['a"b', "a\\b"])
def test_names_with_which_libvirt_reports_a_snapshot_that_qemu_did_not_take(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be the name"):
        check_snapshot_name(name)


def test_the_memory_goes_to_a_file_that_is_named_in_full() -> None:
    memory = parse(format_snapshot("s1", None, "/img/a b.memory")).find("memory")
    assert memory is not None
    assert dict(memory.attrib) == {"snapshot": "external", "file": "/img/a b.memory"}
    for wrong in ("", "a.memory", "/img/a\nb"):
        with pytest.raises(InvalidRequest):
            format_snapshot("s1", None, wrong)
