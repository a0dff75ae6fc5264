"""Checkpoints of several engines, stops, starts and snapshots in one history."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.block_jobs import overlay
from integration.conftest import MakeMachine
from integration.evidence import DISKS, Timeline, bitmaps, domain_of, known, on_tops
from integration.stand import Machine

QCOW2 = {"vda", "vdb", "sda"}
TWO = (DISKS[0], DISKS[1])


class Story:
    """A machine whose checkpoints are made by one engine and then another."""

    def __init__(self, machine: Machine, store: Path) -> None:
        self.machine = machine
        self.store = store
        self.timeline = Timeline(machine)

    def create(self, name: str, engine: str) -> None:
        self.timeline.scatter()
        assert domain_of(self.machine, self.store, engine).create(name).engine == engine
        self.timeline.cut(name)


def test_differences_are_exact_across_engines_stops_and_starts(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    story = Story(make_vm(DISKS), tmp_path)
    machine, names = story.machine, ("c0", "c1", "c2", "c3", "c4", "c5")
    story.create("c0", "libvirt")
    story.create("c1", "monitor")
    story.create("c2", "libvirt")
    machine.stop()
    story.create("c3", "offline")
    machine.start()
    story.create("c4", "libvirt")
    story.create("c5", "monitor")

    story.timeline.scatter()
    domain = domain_of(machine, tmp_path)
    story.timeline.check_all(domain, names, QCOW2)
    # the raw disk: its bitmap of c1 ended with the first QEMU, that of c5 is there
    by_monitor = domain_of(machine, tmp_path, "monitor")
    story.timeline.check(by_monitor, "c1", None, QCOW2)
    story.timeline.check(by_monitor, "c5", None, {*QCOW2, "vdc"})

    persistent = on_tops(machine, QCOW2, *names)
    assert bitmaps(machine) == persistent | on_tops(machine, {"vdc"}, "c5")
    assert known(machine) == dict(zip(names, (None, *names), strict=False))
    machine.stop()
    assert bitmaps(machine) == persistent
    story.timeline.check_all(domain, ("c0", "c3", "c5"), QCOW2)
    assert domain.delete("c3") == ("c3",)  # made offline, deleted offline
    machine.start()
    assert domain.delete("c1") == ("c1",)  # made by the monitor, deleted by libvirt
    assert by_monitor.delete("c4") == ("c4",)  # and the other way round
    story.timeline.check_all(domain, ("c0", "c2", "c5"), QCOW2)
    assert bitmaps(machine) == on_tops(machine, QCOW2, "c0", "c2", "c5")


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_differences_and_deletions_reach_through_overlays(
    engine: str, make_vm: MakeMachine, tmp_path: Path
) -> None:
    """As with ``virsh snapshot-create --disk-only``, which spreads bitmaps over the layers."""
    story = Story(make_vm(TWO), tmp_path)
    machine, tracked = story.machine, {"vda", "vdb"}
    story.create("c0", engine)
    story.timeline.scatter()
    overlay(machine, "vda", "vdb")
    story.create("c1", engine)
    story.timeline.scatter()
    overlay(machine, "vda")
    story.create("c2", engine)
    story.timeline.scatter()
    domain = domain_of(machine, tmp_path, engine)
    story.timeline.check_all(domain, ("c0", "c1", "c2"), tracked)
    before = bitmaps(machine)
    assert len([image for image, name in before if name == "c0"]) == 5
    assert domain.delete("c0") == ("c0",)
    assert bitmaps(machine) == {(image, name) for image, name in before if name != "c0"}
    story.timeline.check_all(domain, ("c1", "c2"), tracked)
    assert domain.delete("c2") == ("c2",)
    story.timeline.check_all(domain, ("c1",), tracked)
    assert domain.delete("c1") == ("c1",)
    assert bitmaps(machine) == set()


def test_a_stopped_machine_is_read_through_its_overlays(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    story = Story(make_vm(TWO), tmp_path)
    story.create("c0", "libvirt")
    story.timeline.scatter()
    overlay(story.machine, "vda", "vdb")
    story.timeline.scatter()
    story.machine.stop()
    story.create("c1", "offline")
    story.timeline.scatter()
    domain = domain_of(story.machine, tmp_path)
    story.timeline.check_all(domain, ("c0", "c1"), {"vda", "vdb"})
    assert domain.delete("c0") == ("c0",)
    assert {name for _, name in bitmaps(story.machine)} == {"c1"}
    story.timeline.check_all(domain, ("c1",), {"vda", "vdb"})
