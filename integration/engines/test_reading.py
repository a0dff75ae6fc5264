"""Every interval is what was written in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nbd
import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.document import format_libvirt
from ckptmgr.engine.qemu_img import serve
from ckptmgr.nbd import read_dirty_map
from ckptmgr.plan.steps import CheckpointRedefine, Export
from integration.block_jobs import overlay
from integration.conftest import MakeMachine
from integration.stand import MIB, Stand, await_greeting
from integration.stand.patience import patiently

from .driver import (
    DISKS,
    GRANULARITY,
    LIBVIRT,
    MONITOR,
    OFFLINE,
    Driver,
    Writes,
    extents,
    of,
)


@pytest.mark.each_release
def test_every_interval_is_what_was_written_in_it(driver: Driver) -> None:
    machine, writes = driver.machine, Writes(driver.machine)
    for target in GRANULARITY:
        machine.write(target, 0, MIB)  # before the first checkpoint: in no interval
    writes.since()
    assert driver.create("c0").maps == {}
    previous = "c0"
    for number in range(1, 4):
        for at, target in enumerate(GRANULARITY):
            machine.write(target, (number * 10 + at) * MIB + 512, 1024)
            machine.write(target, 64 * MIB - number * 512, 512)
        closed = driver.create(f"c{number}", previous)
        marked = writes.since()
        assert extents(closed.maps) == of(driver, marked)
        previous = f"c{number}"
    machine.write("vda", 5 * MIB, 1)
    machine.write("vdb", 7 * MIB, 8192)
    marked = of(driver, writes.since())
    assert extents(driver.read("c3").maps) == marked
    assert extents(driver.read("c3").maps) == marked  # reading changes nothing


def test_a_clean_interval_is_known_to_be_clean(driver: Driver) -> None:
    driver.create("c0")
    maps = driver.create("c1", "c0").maps
    assert set(maps) == set(driver.targets)
    assert all(found.is_empty for found in maps.values())


@pytest.mark.each_release
def test_nothing_but_the_checkpoints_bitmaps_is_left(driver: Driver) -> None:
    driver.create("c0")
    driver.create("c1", "c0")
    driver.read("c1")
    assert {(disk, name) for disk, _, name in driver.bitmaps()} == {
        (target, name) for target in driver.targets for name in ("c0", "c1")
    }
    socket = driver.socket
    assert socket is None or not Path(socket).exists()
    assert not list(driver.scratch.glob("*.scratch"))


@pytest.mark.each_release
def test_bitmaps_are_what_libvirts_own_are(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    driver = Driver(machine, MONITOR)
    Driver(machine, LIBVIRT).create("own")
    driver.create("ours")
    own, ours = (machine.bitmaps("vda")[name] for name in ("own", "ours"))
    assert {**own, "name": None} == {**ours, "name": None}


@pytest.mark.each_release
@pytest.mark.parametrize("engine", [MONITOR, OFFLINE])
def test_libvirt_takes_over_what_the_other_engines_made(
    engine: EngineName, stand: Stand, make_vm_on: MakeMachine
) -> None:
    disks = DISKS[:2]
    machine = make_vm_on(stand, disks, state="stopped" if engine is OFFLINE else "paused")
    Driver(machine, engine).create("c0", tell=True)
    if engine is OFFLINE:
        machine.start()
    driver = Driver(machine, LIBVIRT)
    document = format_libvirt(driver.checkpoint("c0"))
    driver.engine.run([CheckpointRedefine("c0", document, validate=True)])
    machine.write("vda", 3 * MIB, MIB)
    assert extents(driver.create("c1", "c0").maps) == {"vda": [(3 * MIB, MIB)], "vdb": []}


@pytest.mark.each_release
def test_an_interval_is_whole_across_an_external_snapshot(running: Driver) -> None:
    machine, writes = running.machine, Writes(running.machine)
    if running.name is MONITOR:
        running.targets.remove("vdc")  # libvirt's snapshots keep persistent bitmaps alone
    running.create("c0")
    machine.write("vda", 1 * MIB, MIB)
    overlay(machine, "vda")
    machine.write("vda", 9 * MIB, MIB)
    machine.write("vdb", 9 * MIB, MIB)
    assert extents(running.create("c1", "c0").maps) == of(running, writes.since())


def test_more_extents_than_one_reply_can_hold(tmp_path: Path) -> None:
    image, granule, count = tmp_path / "many.qcow2", 512, 70_000
    size = 2 * granule * count
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "512", image, "b"], check=True)
    socket = tmp_path / "s"
    serve_it = ["qemu-nbd", "-t", "-f", "qcow2", "--cache=unsafe", "-k", socket, image]
    server = subprocess.Popen(serve_it)
    await_greeting(socket, server)
    handle = nbd.NBD()
    handle.connect_unix(str(socket))
    data = nbd.Buffer.from_bytearray(b"x" * granule)
    for number in range(count):
        handle.aio_pwrite(data, 2 * number * granule)
        while handle.aio_in_flight() > 64:
            handle.poll(-1)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()
    server.terminate()
    assert server.wait(patiently(60)) == 0
    with serve("vda", str(image), "b") as served:
        found = read_dirty_map(served.socket, Export("vda", "", "b", granule))
    assert list(found.extents()) == [(2 * n * granule, granule) for n in range(count)]
