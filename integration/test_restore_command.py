"""restore as a process, without a hypervisor and with one: what it prints, its JSON, its status."""

from __future__ import annotations

import os
from pathlib import Path

import libvirt

from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.stand import MIB, Daemon, DiskSpec


def test_every_way_to_restore(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> None:
    name = "web <\"server\"> & 'größe' $(id)"
    specs = [DiskSpec("vda", size=8 * MIB), DiskSpec("vdb", size=4 * MIB, format="raw")]
    machine = make_vm_on(daemon, specs, name=name, state="running")
    ours = CommandLine(daemon, tmp_path / "store")
    repo = tmp_path / "repo"
    held = {}
    for number, point in enumerate(("monday", "tuesday")):
        machine.write("vda", number * MIB, 300_000, number + 1)
        machine.write("vdb", number * MIB, 100_000, number + 5)
        held[point] = {target: machine.contents(target) for target in ("vda", "vdb")}
        ours.ok("backup", name, repo, point)
    machine.write("vda", 4 * MIB, 4096, 9)

    # No libvirt is asked: there is none at this address.
    alone = CommandLine(daemon, tmp_path / "store", uri="qemu+unix:///system?socket=/nowhere")
    volume = tmp_path / "volume"
    volume.write_bytes(os.urandom(5 * MIB))
    plan = alone.json(
        "restore", repo, name, "tuesday", tmp_path / "to", "--onto", f"vdb={volume}", "--dry-run"
    )
    assert plan["dry_run"] is True
    assert len(plan["steps"]) == 2
    done = alone.json("restore", repo, name, "tuesday", tmp_path / "to", "--onto", f"vdb={volume}")
    assert done["point"] == "tuesday"
    assert done["domain"] is None
    assert [(disk["name"], disk["format"], disk["virtual_size"]) for disk in done["disks"]] == [
        ("vda", "qcow2", 8 * MIB),
        ("vdb", "raw", 4 * MIB),
    ]
    assert volume.read_bytes()[: 4 * MIB] == held["tuesday"]["vdb"]
    ran = alone("restore", repo, name, "sunday", tmp_path / "to2", "--json")
    assert (ran.status, ran.json["error"]["code"]) == (3, "no-point")
    ran = alone("restore", repo, name, "monday", "--in-place", "--json")
    assert (ran.status, ran.json["error"]["code"]) == (1, "connection")

    # A new domain.
    printed = ours.ok("restore", repo, name, "monday", tmp_path / "new", "--define", "web 2")
    assert str(tmp_path / "new/vda.qcow2") in printed
    assert ours.ok("current", "web 2") == "monday\n"
    ran = ours("restore", repo, name, "monday", tmp_path / "new2", "--define", "web 2", "--json")
    assert (ran.status, ran.json["error"]["code"]) == (2, "invalid-request")
    found = daemon.handle.lookupByName("web 2")
    assert found.UUIDString() != machine.domain.UUIDString()
    found.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)

    # In place.
    ran = ours("restore", repo, name, "monday", "--in-place", "--json")
    assert (ran.status, ran.json["error"]["code"]) == (2, "invalid-request")
    machine.stop()
    done = ours.json("restore", repo, name, "monday", "--in-place")
    assert done["domain"] == {"name": name, "uuid": machine.domain.UUIDString()}
    for target in ("vda", "vdb"):
        assert machine.contents(target) == held["monday"][target]
    current = ours.ok("current", name).strip()
    assert ours.ok("parent", name, current) == "monday\n"
    assert ours.ok("parent", name, "tuesday") == "monday\n"
    assert ours("check", name).status == 0
    machine.start()
    machine.write("vda", 3 * MIB, 65536, 0x33)
    made = ours.json("backup", name, repo, "wednesday")
    assert made["parent"] == "monday"
    (disk, raw) = made["disks"]
    assert (disk["mode"], disk["base"], disk["reason"]) == ("incremental", "monday", None)
    assert disk["bytes"] < MIB
    assert raw["mode"] == "incremental"
