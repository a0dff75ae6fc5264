"""What ``show --xml`` prints: libvirt's schema validates it, and libvirt takes it back."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest
from lxml import etree

from integration.conftest import MakeMachine
from integration.evidence import domain_of, known
from integration.stand import MIB, DiskSpec

SCHEMA = Path("/usr/share/libvirt/schemas/domaincheckpoint.rng")
HOSTILE = "my <vm> & \"its\" 'disks' ]]> über 日本 %s $(x)"
DISKS = (
    DiskSpec("vda", size=MIB),
    DiskSpec("vdb", size=MIB, format="raw"),
    DiskSpec("sda", size=MIB, backing=("qcow2",)),
    DiskSpec("hda", device="cdrom", format="raw", empty=True, read_only=True),
)

VALIDATE = (
    libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
)


@pytest.mark.parametrize("engine", ["libvirt", "monitor", "offline"])
def test_documents_are_valid_and_libvirt_takes_them_back(
    engine: str, make_vm: MakeMachine, tmp_path: Path
) -> None:
    stopped = engine == "offline"
    machine = make_vm(DISKS, name=f"{HOSTILE} {engine}", state="stopped" if stopped else "paused")
    domain = domain_of(machine, tmp_path, engine)
    longest = "n" * 200
    for name in ("-dash", longest, "1795390000", "A.b_c-"):
        domain.create(name, description=f"<!-- {HOSTILE} --> line\nline\ttab &amp; <a/>")
    domain.delete("1795390000")
    names = ("-dash", longest, "A.b_c-")
    documents = {name: domain.document(name) for name in names}
    if not stopped:
        documents["A.b_c-"] = domain.document("A.b_c-", size=True)
        assert "size=" in documents["A.b_c-"]
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    for document in documents.values():
        root = etree.fromstring(document)
        assert schema.validate(root), schema.error_log
        assert root.findtext("domain/name") == machine.name
        assert {child.prefix for child in root} == {None}  # nothing of ours
        assert root.findtext("description") == f"<!-- {HOSTILE} --> line\nline\ttab &amp; <a/>"
    if stopped:
        machine.start()
    for again in range(2):  # over what it has, and to what it has lost
        for document in documents.values():
            machine.domain.checkpointCreateXML(document, VALIDATE)
        assert known(machine) == dict(zip(names, (None, *names), strict=False))
        if not again:
            for checkpoint in machine.domain.listAllCheckpoints():
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def test_the_schema_test_can_fail() -> None:
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    wrong = "<domaincheckpoint><name>a</name><x xmlns='urn:ckptmgr:1'/></domaincheckpoint>"
    assert not schema.validate(etree.fromstring(wrong))
