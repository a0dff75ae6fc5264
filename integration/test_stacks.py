"""The same promises on three generations of libvirt and QEMU."""

from __future__ import annotations

import re
import time
from typing import Any

import libvirt
import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.errors import Unsupported
from integration.conftest import MakeMachine
from integration.stacks import Stack
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Machine, rounded
from integration.stand.patience import patiently
from integration.tracked import DISKS, LIBVIRT, MONITOR, OFFLINE, Tracked, fitting, two_checkpoints


@pytest.mark.scenario("create, diff, delete")
@pytest.mark.parametrize("engine", ["auto", *EngineName])
def test_every_diff_is_what_was_written(
    engine: str, stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    asked = None if engine == "auto" else EngineName(engine)
    machine = make_vm_on(stack, DISKS, state="stopped" if asked is OFFLINE else "paused")
    tracked = Tracked(stack, machine, asked)
    if asked is LIBVIRT and fitting(stack) is MONITOR:
        with pytest.raises(Unsupported, match="engine 'libvirt' cannot work on domain") as refusal:
            tracked.create("c0")
        assert tracked.names() == []
        cell.refused(refusal.value.message)
        return
    used = asked or fitting(stack)
    if asked is None:
        cell.chose(used)
    for number in range(5):
        tracked.write(2 * number)
        assert tracked.create(f"c{number}").engine is used
        tracked.write(2 * number + 1)

    def expected(start: str, end: str | None = None) -> dict[str, Any]:
        written: dict[str, Any] = tracked.written(start, end)
        return written if used is MONITOR else {**written, "vdc": None}

    def check(*names: str) -> None:
        assert tracked.names() == list(names)
        for start, end in zip(names, [*names[1:], None], strict=True):
            assert tracked.shown(start, end) == expected(start, end)
        assert tracked.shown(names[0]) == expected(names[0])
        assert machine.bitmaps("vda").keys() == set(names)

    check("c0", "c1", "c2", "c3", "c4")
    for gone, left in (("c2", "0134"), ("c0", "134"), ("c4", "13")):
        assert tracked.domain.delete(gone) == (gone,)
        check(*(f"c{number}" for number in left))
    assert tracked.create("c5").parent == "c3"
    tracked.write(99)
    check("c1", "c3", "c5")


@pytest.mark.scenario("which engine, and why")
def test_the_engine_that_fits_is_chosen_and_the_reason_given(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    tracked = Tracked(stack, make_vm_on(stack))
    with caplog.at_level("INFO", logger="ckptmgr"):
        chosen = tracked.create("c0").engine
    cell.chose(chosen)
    assert chosen is fitting(stack)
    why = {
        LIBVIRT: "engine libvirt: libvirt supports checkpoints of this domain",
        MONITOR: "engine monitor: libvirt does not support checkpoints with this domain's QEMU",
    }
    assert why[chosen] in caplog.messages


@pytest.mark.scenario("a disk grown, one plugged in, one unplugged and another put in its place")
def test_each_disk_is_judged_on_its_own(stack: Stack, make_vm_on: MakeMachine, cell: Cell) -> None:
    machine = make_vm_on(stack, (DiskSpec("vda"), DiskSpec("vdb")))
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.domain.blockResize("vdb", 80 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    plug(machine, "vdc", DiskSpec("vdc"))
    machine.write("vda", 40 * MIB, MIB)
    machine.write("vdb", 70 * MIB, MIB)
    now = tracked.shown("c1")
    assert now["vda"] == tracked.written("c1")["vda"]
    assert now["vdc"] is None
    # what was not there when the interval began counts as written
    grown = [*tracked.written("c1")["vdb"], (64 * MIB, 16 * MIB)]
    assert now["vdb"] == rounded(grown, 65536, 80 * MIB)
    tracked.create("c2")
    machine.write("vda", 50 * MIB, MIB)
    unplug(machine, "vdc")
    plug(machine, "vdc", DiskSpec("vdx"))
    assert tracked.shown("c1", "c2") == now
    later = tracked.shown("c2")
    assert later["vda"] == tracked.written("c2")["vda"]
    assert later["vdb"] == []
    assert later["vdc"] is None
    # only the disk that was put in another's place is worth a cure
    assert tracked.problems() == ["disk-replaced"]
    tracked.domain.repair()
    assert tracked.problems() == []
    assert tracked.shown("c1", "c2") == now
    cell.chose(fitting(stack))


def unplug(machine: Machine, target: str) -> None:
    """Take a disk out of a running machine."""
    (alias,) = re.findall(
        rf"<target dev='{target}' .*?<alias name='(.*?)'/>", machine.domain.XMLDesc(), re.DOTALL
    )
    machine.domain.detachDeviceAlias(alias)
    # no guest answers; QEMU takes it out at the next reset
    machine.domain.reset()
    deadline = time.monotonic() + patiently(20)
    while f"'{target}'" in machine.domain.XMLDesc():
        assert time.monotonic() < deadline, f"{target} is still there"
        time.sleep(0.05)


def plug(machine: Machine, target: str, disk: DiskSpec) -> None:
    """Put a new disk into a running machine as `target`."""
    image = disk.make(machine.folder)
    machine.domain.attachDevice(
        f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}'/>"
        f"<source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
    )
