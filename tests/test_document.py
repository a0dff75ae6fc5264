from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lxml import etree

from ckptmgr import xml
from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ckptmgr.document import (
    bitmap_sizes,
    format_libvirt,
    format_request,
    format_store,
    parse_libvirt,
    parse_sealed,
    parse_store,
    with_sizes,
)
from ckptmgr.errors import InvalidDocument, InvalidRequest

from .strategies import checkpoints, texts

SCHEMA = Path("/usr/share/libvirt/schemas/domaincheckpoint.rng")
DIGEST = "0123456789abcdef" * 4

DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm &lt;1&gt;</name>
  <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <memory unit='KiB'>131072</memory>
  <os>
    <type arch='x86_64'>hvm</type>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/img/a.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-S'/>
  </qemu:commandline>
</domain>"""

CHECKPOINT = Checkpoint(
    name="c1",
    created=1700000000,
    parent="c0",
    engine=EngineName.LIBVIRT,
    disks=(
        CheckpointDisk(
            "vda",
            bitmap="c1",
            granularity=65536,
            node="libvirt-1-format",
            size=67108864,
            source="/img/a.qcow2",
            state=State.RECORDING,
            interval=Interval("c0", DIGEST),
        ),
        CheckpointDisk("vdb", reason="raw images cannot keep bitmaps"),
    ),
    description="before <the> update",
    domain_xml=DOMAIN,
)

LIBVIRT = f"""\
<domaincheckpoint>
  <name>c1</name>
  <description>before &lt;the&gt; update</description>
  <parent>
    <name>c0</name>
  </parent>
  <creationTime>1700000000</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='c1'/>
    <disk name='vdb' checkpoint='no'/>
  </disks>
  {DOMAIN}
</domaincheckpoint>
"""

OURS = f"""\
  <ckptmgr:checkpoint xmlns:ckptmgr='urn:ckptmgr:1' engine='libvirt'>
    <ckptmgr:disk name='vda' bitmap='c1' node='libvirt-1-format' granularity='65536' \
persistent='yes' size='67108864' source='/img/a.qcow2' state='recording'>
      <ckptmgr:interval since='c0' map='{DIGEST}'/>
    </ckptmgr:disk>
    <ckptmgr:disk name='vdb' state='none' reason='raw images cannot keep bitmaps'/>
  </ckptmgr:checkpoint>
"""

STORE = LIBVIRT.replace("</domaincheckpoint>", OURS + "</domaincheckpoint>")


@cache
def schema() -> etree.RelaxNG:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed")
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def test_libvirts_document_is_laid_out_as_libvirt_prints_it() -> None:
    assert format_libvirt(CHECKPOINT) == LIBVIRT


def test_the_stores_document_is_libvirts_and_one_element_more() -> None:
    assert format_store(CHECKPOINT) == STORE


def test_both_documents_are_read_back() -> None:
    assert parse_store(STORE) == CHECKPOINT
    read = parse_libvirt(LIBVIRT)
    assert read == replace(
        CHECKPOINT,
        disks=(
            CheckpointDisk("vda", bitmap="c1", state=State.RECORDING),
            CheckpointDisk("vdb"),
        ),
    )
    assert parse_libvirt(STORE) == read


@given(checkpoints())
def test_every_checkpoint_is_read_back_as_it_was_written(checkpoint: Checkpoint) -> None:
    document = format_store(checkpoint)
    assert parse_store(document) == parse_sealed(document) == checkpoint
    assert format_store(parse_store(document)) == document


@given(checkpoints())
def test_libvirts_document_holds_nothing_of_ours_and_the_same_checkpoint(
    checkpoint: Checkpoint,
) -> None:
    document = format_libvirt(checkpoint)
    assert all(
        not str(element.tag).startswith("{urn:ckptmgr") for element in xml.parse(document).iter()
    )
    read = parse_libvirt(document)
    same = ("name", "created", "parent", "description", "domain_xml")
    assert all(getattr(read, field) == getattr(checkpoint, field) for field in same)
    assert [disk.name for disk in read.disks] == [disk.name for disk in checkpoint.disks]


@given(checkpoints())
def test_what_we_print_validates_against_libvirts_schema(checkpoint: Checkpoint) -> None:
    # Its own <domain>s are checked below; the made-up ones are not domains to libvirt.
    relaxng = schema()
    relaxng.assertValid(xml.parse(format_libvirt(replace(checkpoint, domain_xml=None))))


def test_a_document_with_a_domain_validates_against_libvirts_schema() -> None:
    relaxng = schema()
    relaxng.assertValid(xml.parse(format_libvirt(CHECKPOINT)))
    relaxng.assertValid(xml.parse(format_request("c1", "text", [("vda", "bitmap"), ("vdb", "no")])))
    assert not relaxng.validate(xml.parse(format_store(CHECKPOINT)))


def test_the_restore_point_that_a_checkpoint_is_stands_in_our_element_alone() -> None:
    checkpoint = replace(CHECKPOINT, point="0123456789abcdef" * 2)
    assert format_libvirt(checkpoint) == LIBVIRT
    document = format_store(checkpoint)
    assert document == STORE.replace(
        "engine='libvirt'>", "engine='libvirt' point='0123456789abcdef0123456789abcdef'>"
    )
    assert parse_store(document) == parse_sealed(document) == checkpoint
    assert parse_libvirt(document).point is None


@pytest.mark.parametrize("point", ["", "0" * 31, "0" * 33, "ABCDEF" + "0" * 26, "../" + "0" * 29])
def test_what_cannot_be_the_identity_of_a_restore_point_is_refused(point: str) -> None:
    with pytest.raises(InvalidRequest, match="restore point"):
        format_store(replace(CHECKPOINT, point=point))
    document = format_store(replace(CHECKPOINT, point="0" * 32)).replace("0" * 32, point)
    with pytest.raises(InvalidDocument, match="restore point"):
        parse_store(document)


def test_bitmaps_that_the_image_does_not_hold_are_not_shown_to_libvirt() -> None:
    for disk in (
        CheckpointDisk("vda", bitmap="c1", persistent=False, state=State.RECORDING),
        CheckpointDisk("vda", bitmap="c1", state=State.ARCHIVED),
    ):
        document = format_libvirt(replace(CHECKPOINT, disks=(disk,)))
        assert "<disk name='vda' checkpoint='no'/>" in document


def test_a_checkpoint_without_disks_has_no_empty_disks_element() -> None:
    assert "<disks" not in format_libvirt(replace(CHECKPOINT, disks=()))
    assert "<disks" not in format_request("c1", None, [])


def test_a_request_says_what_is_wanted_and_nothing_else() -> None:
    assert format_request("c1", "it's <new>", [("vda", "bitmap"), ("vdb", "no")]) == (
        "<domaincheckpoint>\n"
        "  <name>c1</name>\n"
        "  <description>it's &lt;new&gt;</description>\n"
        "  <disks>\n"
        "    <disk name='vda' checkpoint='bitmap'/>\n"
        "    <disk name='vdb' checkpoint='no'/>\n"
        "  </disks>\n"
        "</domaincheckpoint>\n"
    )


def test_sizes_are_added_to_the_disks_that_have_one() -> None:
    document = with_sizes(LIBVIRT, {"vda": 131072, "vdb": 1, "vdz": 2})
    assert "<disk name='vda' checkpoint='bitmap' bitmap='c1' size='131072'/>" in document
    assert "<disk name='vdb' checkpoint='no'/>" in document
    assert bitmap_sizes(document) == {"vda": 131072}
    schema().assertValid(xml.parse(document))


@pytest.mark.parametrize("text", ["\0", "\x07", "a\x1b[31m", "\ufffe", "\ud800"])
def test_text_that_xml_cannot_hold_is_refused_before_anything_is_done(text: str) -> None:
    with pytest.raises(InvalidRequest, match="XML cannot hold"):
        format_request("c1", text, [("vda", "bitmap")])
    with pytest.raises(InvalidRequest, match="XML cannot hold"):
        format_store(replace(CHECKPOINT, description=text))


def test_a_reason_may_quote_anything() -> None:
    disk = CheckpointDisk("vda", reason="qemu said \x1b[31mno\x00")
    read = parse_store(format_store(replace(CHECKPOINT, disks=(disk,))))
    assert read.disks[0].reason == "qemu said \ufffd[31mno\ufffd"


@pytest.mark.parametrize("name", ["", ".c1", "a/b", "a b", "é", "a" * 201, "a\n"])
def test_names_that_libvirt_refuses_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        format_request(name, None, [("vda", "bitmap")])
    with pytest.raises(InvalidRequest):
        format_store(replace(CHECKPOINT, name=name))


def test_the_domain_is_kept_character_by_character() -> None:
    domain = (
        "<domain type='kvm'\tid=\"7\">\r\n<!-- </domain> --><a  b='1'/>&#9;"
        "<![CDATA[<domain>]]></domain>"
    )
    document = format_store(replace(CHECKPOINT, domain_xml=domain))
    assert parse_store(document).domain_xml == domain


def test_a_declaration_and_comments_around_the_domain_are_left_out() -> None:
    domain = (
        "<?xml version='1.0' encoding='UTF-8'?>\n<!-- c -->\n<domain type='kvm'><a/></domain>\n"
    )
    document = format_store(replace(CHECKPOINT, domain_xml=domain))
    assert parse_store(document).domain_xml == '<domain type="kvm"><a/></domain>'


@pytest.mark.parametrize(
    "domain", ["<domainsnapshot/>", "<domain>", "", "<!DOCTYPE domain><domain/>"]
)
def test_what_is_not_a_domain_is_not_recorded_as_one(domain: str) -> None:
    with pytest.raises(InvalidDocument):
        format_store(replace(CHECKPOINT, domain_xml=domain))


@pytest.mark.parametrize(
    "document",
    [
        "<!-- <domain>no</domain> -->" + LIBVIRT,
        LIBVIRT.replace("  <disks>", "  <!-- <domain>no</domain> -->\n  <disks>"),
        LIBVIRT + "<!-- </domain> -->",
        LIBVIRT.replace("before &lt;the&gt; update", "<![CDATA[<domain>no</domain>]]>"),
    ],
)
def test_what_looks_like_a_domain_is_not_taken_for_it(document: str) -> None:
    text = parse_libvirt(document).domain_xml
    assert text is not None
    assert etree.canonicalize(text) == etree.canonicalize(DOMAIN)


def test_a_domain_that_uses_a_namespace_of_the_root_keeps_it() -> None:
    document = (
        "<domaincheckpoint xmlns:q='urn:q'><name>c1</name><creationTime>1</creationTime>"
        "<domain type='kvm'><q:a/></domain></domaincheckpoint>"
    )
    domain = parse_libvirt(document).domain_xml
    assert domain is not None
    assert xml.parse(domain)[0].tag == "{urn:q}a"


def test_libvirts_defaults_are_filled_in() -> None:
    read = parse_libvirt(
        "<domaincheckpoint><name>c1</name><description/><creationTime> 5 </creationTime>"
        "<disks><disk name='vda'/><disk name='/img/b' bitmap='x' size='1'/></disks>"
        "</domaincheckpoint>"
    )
    assert read.description is None
    assert read.created == 5
    assert [(disk.name, disk.bitmap) for disk in read.disks] == [("vda", "c1"), ("/img/b", "x")]


BAD_LIBVIRT = {
    "other root": "<domainsnapshot><name>c1</name></domainsnapshot>",
    "no name": LIBVIRT.replace("  <name>c1</name>\n", ""),
    "no creation time": LIBVIRT.replace("  <creationTime>1700000000</creationTime>\n", ""),
    "bad name": LIBVIRT.replace("<name>c1<", "<name>../c1<"),
    "empty name": LIBVIRT.replace("<name>c1<", "<name><"),
    "bad parent": LIBVIRT.replace("<name>c0<", "<name>.c0<"),
    "own parent": LIBVIRT.replace("<name>c0<", "<name>c1<"),
    "parent without name": LIBVIRT.replace("<name>c0</name>", ""),
    "two parents": LIBVIRT.replace("<name>c0</name>", "<name>c0</name><name>cx</name>"),
    "two names": LIBVIRT.replace("<name>c1</name>", "<name>c1</name><name>c2</name>"),
    "elements in a name": LIBVIRT.replace("<name>c1<", "<name>c<b/>1<"),
    "negative time": LIBVIRT.replace(">1700000000<", ">-1<"),
    "time that is no number": LIBVIRT.replace(">1700000000<", ">1e9<"),
    "huge time": LIBVIRT.replace(">1700000000<", ">253402300800<"),
    "digits of another script": LIBVIRT.replace(">1700000000<", ">١٢<"),
    "disk twice": LIBVIRT.replace("name='vdb'", "name='vda'"),
    "disk without name": LIBVIRT.replace("name='vdb' ", ""),
    "unknown mode": LIBVIRT.replace("checkpoint='no'", "checkpoint='maybe'"),
    "no, with bitmap": LIBVIRT.replace("checkpoint='no'", "checkpoint='no' bitmap='c1'"),
    "unknown attribute": LIBVIRT.replace("checkpoint='no'", "checkpoint='no' colour='red'"),
    "unknown element": LIBVIRT.replace("  <disks>", "  <current/>\n  <disks>"),
    "element among disks": LIBVIRT.replace("  <disks>", "  <disks><file/>"),
    "malformed": LIBVIRT[:-5],
    "empty": "",
    "DOCTYPE": "<!DOCTYPE x [<!ENTITY a 'b'>]>" + LIBVIRT,
}


@pytest.mark.parametrize("document", BAD_LIBVIRT.values(), ids=BAD_LIBVIRT.keys())
def test_documents_that_libvirt_would_not_take_are_refused(document: str) -> None:
    assert document != LIBVIRT
    with pytest.raises(InvalidDocument):
        parse_libvirt(document)


BAD_STORE = {
    "nothing of ours": LIBVIRT,
    "ours twice": STORE.replace(OURS, OURS + OURS),
    "unknown engine": STORE.replace("engine='libvirt'", "engine='magic'"),
    "no engine": STORE.replace(" engine='libvirt'", ""),
    "unknown state": STORE.replace("'recording'", "'dreaming'"),
    "no state": STORE.replace(" state='recording'", ""),
    "state of an untracked disk": STORE.replace("'none'", "'recording'"),
    "tracked disk without state": STORE.replace("'recording'", "'none'"),
    "short digest": STORE.replace(DIGEST, DIGEST[:-1]),
    "digest in capitals": STORE.replace(DIGEST, DIGEST.upper()),
    "digest that leads elsewhere": STORE.replace(DIGEST, "../" + DIGEST[3:]),
    "interval of an untracked disk": STORE.replace(
        "reason='raw images cannot keep bitmaps'/>",
        "><ckptmgr:interval since='c0'/></ckptmgr:disk>",
    ),
    "interval that starts where it ends": STORE.replace("since='c0'", "since='c1'"),
    "interval that starts nowhere": STORE.replace("since='c0' ", ""),
    "known and unknown": STORE.replace("since='c0'", "since='c0' reason='lost'"),
    "two intervals": STORE.replace(
        "<ckptmgr:interval", "<ckptmgr:interval since='c0'/><ckptmgr:interval"
    ),
    "odd granularity": STORE.replace("'65536'", "'65535'"),
    "granularity below a sector": STORE.replace("'65536'", "'256'"),
    "granularity that is no number": STORE.replace("'65536'", "'64K'"),
    "negative size": STORE.replace("'67108864'", "'-1'"),
    "neither yes nor no": STORE.replace("persistent='yes'", "persistent='true'"),
    "bitmap without name": STORE.replace("bitmap='c1'", "bitmap=''"),
    "unknown attribute": STORE.replace("node=", "nodes="),
    "another disk than libvirt's": STORE.replace("disk name='vdb' state", "disk name='vdc' state"),
    "another bitmap than libvirt's": STORE.replace("bitmap='c1' node", "bitmap='cx' node"),
    "unknown element": STORE.replace("<ckptmgr:disk name='vdb'", "<ckptmgr:drive name='vdb'"),
    "another namespace": STORE.replace("urn:ckptmgr:1", "urn:ckptmgr:2"),
}


@pytest.mark.parametrize("document", BAD_STORE.values(), ids=BAD_STORE.keys())
def test_documents_that_the_store_cannot_have_written_are_refused(document: str) -> None:
    assert document != STORE
    with pytest.raises(InvalidDocument):
        parse_store(document)


@pytest.mark.parametrize(
    "disk",
    [
        CheckpointDisk("vda", bitmap="c1"),
        CheckpointDisk("vda", state=State.RECORDING),
        CheckpointDisk("", bitmap="c1", state=State.RECORDING),
        CheckpointDisk("vda", interval=Interval("c0", DIGEST)),
        CheckpointDisk("vda", bitmap="c1", state=State.BROKEN, interval=Interval("c0", "x")),
    ],
)
def test_what_could_not_be_read_back_is_not_written(disk: CheckpointDisk) -> None:
    with pytest.raises(InvalidRequest):
        format_store(replace(CHECKPOINT, disks=(disk,)))


@given(st.data())
def test_no_change_of_a_document_gives_anything_but_a_checkpoint_or_a_refusal(
    data: st.DataObject,
) -> None:
    start = data.draw(st.integers(0, len(STORE)))
    end = data.draw(st.integers(start, min(len(STORE), start + 40)))
    changed = STORE[:start] + data.draw(texts | st.just("")) + STORE[end:]
    assume(changed != STORE)
    for parse in (parse_store, parse_libvirt):
        try:
            checkpoint = parse(changed)
        except InvalidDocument:
            continue
        # What was accepted can be written again: nothing half understood came in.
        assert parse_store(format_store(checkpoint)) == checkpoint
