"""What stopped or was killed at any step can be taken back, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import libvirt
import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.engine.qemu_img import check_free
from integration.conftest import MakeMachine
from integration.stand import MIB, Daemon, Stand, await_rest
from integration.stand.patience import patiently
from integration.stand.workspace import birth

from .driver import DISKS, LIBVIRT, MONITOR, Driver, extents


@pytest.mark.each_release
def test_a_create_that_stopped_after_any_step_can_be_taken_back(driver: Driver) -> None:
    tell = driver.name is not LIBVIRT
    driver.create("c0", tell=tell)
    before, known = driver.bitmaps(), driver.known()
    steps = driver.create_plan("c1", "c0", tell=tell).steps
    for done in range(len(steps) + 1):
        plan = driver.create_plan("c1", "c0", tell=tell)
        driver.engine.run(plan.steps[:done])
        # at once with the plan's own undo, or later with what is then found
        driver.engine.run(plan.undo if done % 2 else driver.undo_later("c1"))
        assert driver.bitmaps() == before, f"after {done} steps"
        assert driver.known() == known
        socket = driver.socket
        assert socket is None or not Path(socket).exists()
    driver.create("c1", "c0", tell=tell)  # nothing stands in the way of the next


def test_a_read_that_stopped_after_any_step_can_be_taken_back(running: Driver) -> None:
    running.create("c0")
    before = running.bitmaps()
    steps = running.read_plan("c0").steps
    for done in range(len(steps) + 1):
        plan = running.read_plan("c0")
        running.engine.run(plan.steps[:done])
        running.engine.run(plan.undo)
        assert running.bitmaps() == before, f"after {done} steps"
    assert not list(running.machine.qmp("query-block-exports"))


def test_a_create_left_behind_does_not_stop_the_next(stand: Stand, make_vm_on: MakeMachine) -> None:
    driver = Driver(make_vm_on(stand, DISKS), MONITOR)
    driver.create("c0")
    driver.engine.run(driver.read_plan("c0").steps[:3])  # killed while the server runs
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.create("c1", "c0").maps)["vda"] == [(MIB, MIB)]


def test_undo_removes_bitmaps_that_libvirt_has_no_metadata_of(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    """libvirt ended between the transaction and the writing of its file."""
    machine = make_vm_on(stand, DISKS[:2])
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    machine.domain.checkpointLookupByName("c0").delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    )
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    assert driver.bitmaps()
    driver.engine.run(driver.undo_later("c0"))
    assert driver.bitmaps() == set()
    assert driver.known() == set()


@pytest.mark.each_release
def test_undo_does_not_change_what_libvirt_takes_for_current(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:2]), LIBVIRT)
    driver.create("c0")
    driver.engine.run(driver.create_plan("c1", "c0").undo)
    driver.create("c1", "c0")
    driver.engine.run(driver.create_plan("c2", "c1").undo)
    driver.create("c2", "c1")
    parents = {
        found.getName(): found.getParent().getName()
        for found in driver.adapter.handle.listAllCheckpoints()
        if found.getName() != "c0"
    }
    assert parents == {"c1": "c0", "c2": "c1"}


def test_nothing_listens_on_after_its_reader_was_killed(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    script = f"""
        import time
        from pathlib import Path
        from ckptmgr.engine.qemu_img import serve
        with serve("vda", {str(image)!r}, "b") as server:
            while not Path(server.socket).exists():
                server.check()
                time.sleep(0.01)
            print(server._process.pid, flush=True)
            time.sleep(60)
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert reader.stdout is not None
    pid = int(reader.stdout.readline())
    assert "qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_text()
    reader.kill()
    reader.wait()
    reader.stdout.close()
    deadline = time.monotonic() + patiently(20)
    while birth(pid) is not None:
        assert time.monotonic() < deadline, "qemu-nbd goes on"
        time.sleep(0.02)
    check_free("vda", str(image))


@pytest.mark.parametrize("early", [False, True], ids=["at work", "being started"])
def test_a_ctrl_c_waits_for_qemu_img(early: bool, tmp_path: Path) -> None:
    """A qemu-img that is ended half way loses all bitmaps of its image.

    early -- it comes when the program has begun, of which Python has not told us yet
    """
    image, tools = tmp_path / "a.qcow2", tmp_path / "bin"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    tools.mkdir()
    slow = tools / "qemu-img"
    begins = "kill -INT $PPID" if early else f"touch {tmp_path}/began"
    slow.write_text(f'#!/bin/sh\n{begins}\nsleep 1\nPATH=$REAL exec qemu-img "$@"\n')
    slow.chmod(0o755)
    script = f"""
        from ckptmgr.engine.qemu_img import change_bitmap
        from ckptmgr.plan.steps import ImageBitmap
        change_bitmap(ImageBitmap("vda", {str(image)!r}, "add", "b"))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "REAL": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        start_new_session=True,
    )
    if not early:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(patiently(60)) != 0
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", image], check=True, capture_output=True
    )
    bitmaps = json.loads(info.stdout)["format-specific"]["data"]["bitmaps"]
    assert [(each["name"], each["flags"]) for each in bitmaps] == [("b", ["auto"])]


@pytest.mark.parametrize("engine", [LIBVIRT, MONITOR])
def test_a_create_killed_at_any_instant_can_be_taken_back(
    engine: EngineName, daemon: Daemon, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(daemon, DISKS), engine)
    driver.create("c0")
    before, known = driver.bitmaps(), driver.known()
    script = f"""
        import sys
        from integration.engines.driver import DISKS, Driver, EngineName
        from ckptmgr.domain.connection import connect
        class Stand: pass
        class Machine: pass
        machine, stand = Machine(), Stand()
        stand.connection = connect({daemon.uri!r})
        machine.stand, machine.name, machine.disks = stand, {driver.machine.name!r}, DISKS
        from pathlib import Path
        machine.folder = Path({str(driver.machine.folder)!r})
        driver = Driver(machine, EngineName({engine.value!r}))
        plan = driver.create_plan("c1", "c0")
        print("ready", flush=True)
        driver.engine.run(plan.steps)
        sys.stdin.read()
    """
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **daemon.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        await_rest(daemon.pid)
        driver.engine.run(driver.undo_later("c1"))
        assert driver.bitmaps() == before, f"killed after {delay} s"
        assert driver.known() == known
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.create("c1", "c0").maps)["vda"] == [(MIB, MIB)]
