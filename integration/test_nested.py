"""What a host with nested KVM is for: machines on real KVM, and Linux that writes through virtio.

Here too, on whatever there is; ``vagrant/run-nested`` runs it where ``CKPTMGR_TEST_ACCEL`` is kvm.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import ckptmgr
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.evidence import has_checkpoints
from integration.stand import MIB, Daemon, DiskSpec, Guest, Stand, rounded
from integration.stand.accel import domain_type
from integration.stand.guest import Shell

pytestmark = pytest.mark.nested

GRANULARITY = 65536

Ranges = list[tuple[int, int]]


@pytest.mark.scenario("on KVM where it should be")
def test_machines_are_on_the_accelerator_that_was_decided(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(stand, [DiskSpec("vda")])
    said = vm.hmp("info kvm").strip()
    print(f"info kvm of {vm.name} on the {stand.kind} libvirt: {said}")
    assert said == f"kvm support: {'enabled' if domain_type() == 'kvm' else 'disabled'}"


@pytest.mark.scenario("a Linux guest: create, diff, delete, revert with a branch")
def test_the_history_of_a_linux_guest_through_a_revert(stand: Stand, tmp_path: Path) -> None:
    """Every difference is what the guest wrote, before and after its QEMU was replaced."""
    written: dict[str, Ranges] = {
        "monday": [(8 * MIB, 70_000), (40 * MIB, 4096)],
        "tuesday": [(20 * MIB, MIB)],
        "abandoned": [(30 * MIB + 512, 512), (63 * MIB, MIB)],
        "reverted": [(50 * MIB, 4096)],
        "wednesday": [(1 * MIB, 65_536)],
    }

    def writes(shell: Shell, after: str) -> None:
        for number, (offset, length) in enumerate(written[after], start=1):
            shell.write("vda", offset, length, number)

    def expected(*after: str) -> Ranges:
        return rounded([each for name in after for each in written[name]], GRANULARITY)

    with (
        Guest(stand, (DiskSpec("vda"),)) as guest,
        ckptmgr.connect(stand.uri, store=tmp_path / "store") as host,
    ):
        domain = host.domain(guest.machine.name)

        def shown(start: str, end: str | None = None) -> Ranges:
            (disk,) = domain.diff(start, end).disks
            assert disk.known, disk.reason
            return disk.extents()

        domain.create("monday")
        writes(guest.shell, "monday")
        domain.create("tuesday")
        writes(guest.shell, "tuesday")
        assert shown("monday", "tuesday") == expected("monday")
        assert shown("monday") == expected("monday", "tuesday")
        before = guest.machine.contents("vda")
        domain.create_snapshot("good")
        domain.create("abandoned")
        writes(guest.shell, "abandoned")
        assert shown("tuesday", "abandoned") == expected("tuesday")

        replaced = guest.machine.pid
        branch = domain.revert_snapshot("good")
        # libvirt 7.0 has QEMU load the snapshot
        assert (guest.machine.pid != replaced) == has_checkpoints(guest.machine)
        assert guest.machine.contents("vda") == before
        assert branch.parent == "tuesday"
        if guest.machine.pid != replaced:
            guest.reconnect()
        writes(guest.shell, "reverted")
        domain.create("wednesday")
        writes(guest.shell, "wednesday")
        assert shown(branch.name, "wednesday") == expected("reverted")
        assert shown("wednesday") == expected("wednesday")
        # what one line has and the other has not
        assert shown("abandoned", "wednesday") == expected("tuesday", "reverted")

        domain.delete("tuesday")
        assert shown("monday", "abandoned") == expected("monday", "tuesday")
        parents = {each.name: each.parent for each in domain.checkpoints().checkpoints}
        assert parents == {
            "monday": None,
            "abandoned": "monday",
            branch.name: "monday",
            "wednesday": branch.name,
        }
        assert [each for each in domain.check() if not each.harmless] == []


@pytest.mark.scenario("a Linux guest: backup, incremental backup, restore")
def test_backups_of_a_linux_guest_come_back_byte_for_byte(daemon: Daemon, tmp_path: Path) -> None:
    """By the command line; the guest runs all the time and goes on writing between the points."""
    ours = CommandLine(daemon, tmp_path / "store")
    repository = tmp_path / "repository"
    with Guest(daemon, (DiskSpec("vda"),)) as guest:
        name, held = guest.machine.name, {}
        for number, point in enumerate(("monday", "tuesday"), start=1):
            guest.shell.write("vda", number * 9 * MIB + 512, 3 * MIB, 0x40 + number)
            assert ours.ok("backup", name, repository, point) == f"{point}\n"
            held[point] = guest.machine.contents("vda")
        guest.shell.write("vda", 50 * MIB, MIB, 0x77)
        assert held["monday"] != held["tuesday"] != guest.machine.contents("vda")

    points = {each["name"]: each for each in ours.json("points", repository)["points"]}
    modes = {point: each["disks"][0]["mode"] for point, each in points.items()}
    assert modes == {"monday": "full", "tuesday": "incremental"}
    # what was written between the two, and qcow2's own
    assert 3 * MIB <= points["tuesday"]["disks"][0]["bytes"] < 5 * MIB
    for point, expected in held.items():
        ours.ok("restore", repository, name, point, tmp_path / point, "--flatten")
        image, raw = tmp_path / point / "vda.qcow2", tmp_path / "seen.raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
        assert raw.read_bytes() == expected, point
