"""A backup of a domain elsewhere: over libvirt's own NBD export with TLS, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.ports import free_port, listens
from integration.stacks.remote import Remote
from integration.stacks.table import Cell
from integration.test_backup import disk_in
from integration.test_remote import command, elsewhere, on_debian11, reading, tracked
from integration.tracked import Tracked

__all__ = ["elsewhere", "tracked"]


@pytest.mark.scenario("from elsewhere: a backup over libvirt's own NBD export with TLS")
def test_a_backup_over_the_network_where_the_settings_allow_it(
    elsewhere: Remote, tracked: Tracked, cell: Cell, tmp_path: Path
) -> None:
    machine = tracked.machine
    repository = tmp_path / "repository"
    ran = command(elsewhere, "tls")("backup", machine.name, repository, "p0")
    assert ran.status == 6
    assert "nbd_address" in ran.err
    assert machine.bitmaps("vda") == {}
    assert not list(repository.glob("*/*/manifest.json"))

    port = free_port()
    settings = reading(tmp_path, elsewhere, nbd_tls=True, nbd_port=port)
    far = command(elsewhere, "tls", settings)
    if on_debian11(elsewhere):
        ran = far("backup", machine.name, repository, "p1")
        assert ran.status == 6
        cell.refused(ran.error)
        return
    held = {}
    for number, name in enumerate(("p1", "p2")):
        tracked.write(number)
        held[name] = {target: machine.contents(target) for target in machine.images}
        far.ok("backup", machine.name, repository, name)
    lineage = repository / machine.domain.UUIDString()
    for name, contents in held.items():
        document = json.loads((lineage / name / "manifest.json").read_text())
        assert {disk["mode"] for disk in document["disks"]} == {
            "full" if name == "p1" else "incremental"
        }
        for target, data in contents.items():
            assert disk_in(lineage / name / f"{target}.qcow2") == data
    assert not listens(port)
    assert far.json("check", machine.name)["consistent"] is True
    assert not list(machine.folder.glob("*.scratch"))
