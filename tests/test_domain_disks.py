"""Every kind of disk that libvirt's XML can say is read as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from ckptmgr.domain.definition import without_secrets
from ckptmgr.domain.disk import Disk, Encryption, Image
from ckptmgr.domain.disks import parse_capabilities, parse_disks
from ckptmgr.domain.support import (
    Machine,
    backup_support,
    has_backup_feature,
    parse_backup_feature,
    parse_machine,
)
from ckptmgr.errors import InvalidDocument

DATA = Path(__file__).parent / "data"


def disks(name: str) -> dict[str, Disk]:
    return {disk.target: disk for disk in parse_disks((DATA / name).read_text())}


def test_a_live_domain_on_blockdev_as_libvirt_9_writes_it() -> None:
    found = disks("domain_blockdev.xml")
    assert list(found) == ["vda", "vdb", "sda", "hda"]
    assert found["vda"] == Disk(
        target="vda",
        bus="virtio",
        alias="virtio-disk0",
        chain=(
            Image("file", "/img/vda.qcow2", "/img/vda.qcow2", "qcow2", index=4),
            Image("file", "/img/base.qcow2", "/img/base.qcow2", "qcow2", index=5),
        ),
    )
    assert found["vdb"].top.format == "raw"
    assert found["sda"].empty
    assert found["sda"].read_only
    assert found["sda"].device == "cdrom"


@pytest.mark.parametrize("where", ["source", "disk", "backing"])
def test_encryption_is_found_wherever_libvirt_writes_it(where: str) -> None:
    """In the disk, as before libvirt 3.9, in its source, or in that of a backing file."""
    said = "<encryption format='luks'><secret type='passphrase' {}/></encryption>".format
    parts = {"source": "", "disk": "", "backing": "", where: said("uuid='u'")}
    (found,) = parse_disks(
        "<domain><devices><disk type='file'><driver type='qcow2'/>"
        f"<source file='/top'>{parts['source']}</source>{parts['disk']}"
        "<backingStore type='file'><format type='raw'/>"
        f"<source file='/base'>{parts['backing']}</source></backingStore>"
        "<target dev='vda'/></disk></devices></domain>"
    )
    keyed = Encryption("luks", ("uuid", "u"))
    expected = (None, keyed) if where == "backing" else (keyed, None)
    assert tuple(image.encryption for image in found.chain) == expected
    assert found.encrypted
    (named,) = parse_disks(
        "<domain><devices><disk type='file'><source file='/top'>"
        + said("usage='/top'")
        + "</source><target dev='vda'/></disk></devices></domain>"
    )
    assert named.top.encryption == Encryption("luks", ("usage", "/top"))


def test_every_source_type_has_a_name_and_only_local_ones_a_path() -> None:
    found = disks("domain_sources.xml")
    assert {
        target: (disk.top.source, disk.top.path) for target, disk in found.items() if disk.chain
    } == {
        "sda": ("/dev/mapper/vg-lv", "/dev/mapper/vg-lv"),
        "vda": ("rbd://mon1:6789,[2001:db8::1]/pool/image", None),
        "vdb": ("nbd:///export?socket=/run/nbd.sock", None),
        "hda": ("https://example.org:443/iso/a.iso?x=1", None),
        "vdc": ("volume:default/a b.qcow2", None),
        "vdd": ("nvme://0000:01:00.0/2", None),
        "vde": ("vhostuser:/run/vhost.sock", None),
        "fda": ("/srv/floppy", None),
        "vdf": ('/img/<a\'s "é".qcow2',) * 2,
        "vdg": ("holographic:crystal=7", None),
    }
    assert found["hdb"].empty
    assert found["sda"].shareable
    assert found["sda"].device == "lun"
    assert found["vdf"].transient
    assert found["vdf"].top.data_file == "/img/data.raw"
    assert found["fda"].device == "floppy"


def test_a_slice_of_a_file_is_seen() -> None:
    text = (DATA / "domain_sources.xml").read_text()
    sliced = text.replace(
        "<source dev='/dev/mapper/vg-lv'/>",
        "<source dev='/dev/mapper/vg-lv'><slices>"
        "<slice type='storage' offset='512' size='1048576'/></slices></source>",
    )
    assert parse_disks(sliced)[0].top.slice_size == 1048576
    assert parse_disks(text)[0].top.slice_size is None


def test_a_chain_that_nobody_looked_at_is_not_taken_for_its_end() -> None:
    found = disks("domain_sources.xml")
    assert not found["vdc"].chain_known  # qcow2 without <backingStore>
    assert found["sda"].chain_known  # raw has no backing file
    assert disks("domain_blockdev.xml")["vda"].chain_known


@pytest.mark.parametrize(
    "text", ["<domainsnapshot/>", "<domain><devices><disk/></devices></domain>", "<domain"]
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidDocument):
        parse_disks(text)


def test_capabilities_that_the_domain_changes() -> None:
    assert parse_capabilities((DATA / "domain_drive.xml").read_text()) == (
        frozenset(),
        frozenset({"blockdev"}),
    )


def test_a_definition_without_secrets_keeps_everything_else() -> None:
    text = (DATA / "domain_sources.xml").read_text()
    clean = without_secrets(text)
    for secret in ("hunter2", "passwd", "cookie", "2030"):
        assert secret in text
        assert secret not in clean
    assert parse_disks(clean) == parse_disks(text)


PATHS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn", "Cc")),
    min_size=1,
).map(lambda name: "/" + name)


@given(st.lists(PATHS, min_size=1, max_size=5), st.booleans(), st.booleans())
def test_any_chain_of_any_paths_comes_back(
    paths: list[str], read_only: bool, indexed: bool
) -> None:
    domain = etree.Element("domain")
    disk = etree.SubElement(etree.SubElement(domain, "devices"), "disk", type="file")
    etree.SubElement(disk, "driver", type="qcow2")
    etree.SubElement(disk, "target", dev="vda", bus="virtio")
    if read_only:
        etree.SubElement(disk, "readonly")
    layer = disk
    for number, path in enumerate(paths, start=1):
        if number > 1:
            layer = etree.SubElement(layer, "backingStore", type="file")
            etree.SubElement(layer, "format", type="qcow2")
        source = etree.SubElement(layer, "source", file=path)
        if indexed:
            (source if number == 1 else layer).set("index", str(number))
    etree.SubElement(layer, "backingStore")
    (found,) = parse_disks(etree.tostring(domain, encoding="unicode"))
    assert [image.path for image in found.chain] == paths
    assert [image.index for image in found.chain] == [
        number if indexed else None for number in range(1, len(paths) + 1)
    ]
    assert found.chain_known
    assert found.read_only == read_only


def test_machine_and_backup_feature() -> None:
    assert parse_machine((DATA / "domain_drive.xml").read_text()) == Machine(
        "/usr/bin/qemu-system-x86_64", "x86_64", "pc-i440fx-5.2", "kvm"
    )
    capabilities = (
        "<domainCapabilities><features><backup supported='{}'/></features></domainCapabilities>"
    )
    assert parse_backup_feature(capabilities.format("yes"))
    assert not parse_backup_feature(capabilities.format("no"))
    assert not parse_backup_feature("<domainCapabilities/>")


def test_the_backup_feature_is_expected_of_versions_that_have_it() -> None:
    assert not has_backup_feature(7_000_000, 5_002_000)
    assert not has_backup_feature(7_006_000, 6_000_000)
    assert not has_backup_feature(7_005_000, 6_001_000)
    assert has_backup_feature(7_006_000, 6_001_000)
    assert has_backup_feature(11_003_000, 10_000_003)


@pytest.mark.parametrize(
    ("feature", "added", "deleted", "blockdev", "works"),
    [
        (True, (), (), True, True),
        (True, (), (), None, True),
        (True, (), (), False, False),  # 7.0 clears the capability without -blockdev
        (True, (), ("incremental-backup",), True, False),
        (False, (), (), True, False),
        (False, ("incremental-backup",), (), True, True),  # 7.0, told to
        (False, ("incremental-backup",), (), False, False),
    ],
)
def test_backup_support(
    feature: bool,
    added: tuple[str, ...],
    deleted: tuple[str, ...],
    blockdev: bool | None,
    works: bool,
) -> None:
    found, reason = backup_support(feature, added, deleted, blockdev)
    assert found == works
    assert reason
