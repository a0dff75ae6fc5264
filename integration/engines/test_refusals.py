"""What belongs to somebody else, is in use or is gone is named and left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest

from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.engine.monitor import listening
from ckptmgr.engine.offline import OfflineEngine
from ckptmgr.engine.qemu_img import check_free, image_name, serve
from ckptmgr.errors import BitmapBroken, Busy, CheckpointExists, Unsupported
from ckptmgr.nbd import read_dirty_map
from ckptmgr.plan.steps import Export, ImageBitmap
from integration.conftest import MakeMachine
from integration.stand import MIB, DiskSpec, Stand

from .driver import DISKS, LIBVIRT, MONITOR, OFFLINE, Driver, extents, holding


def test_somebody_elses_backup_job_is_left_alone(running: Driver) -> None:
    machine = running.machine
    running.create("c0")
    socket, scratch = machine.folder / "theirs.sock", machine.folder / "theirs"
    machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
        "</disks></domainbackup>",
        None,
    )
    bitmaps = running.bitmaps()
    plan = running.create_plan("c1", "c0")
    with pytest.raises(Busy) as caught:
        running.engine.run(plan.steps)
    # It is not libvirt that refused, which would wait for 30 s first.
    assert not isinstance(caught.value.__cause__, libvirt.libvirtError)
    running.engine.run(plan.undo)
    with pytest.raises(Busy):
        running.read("c0")
    running.engine.run(running.read_plan("c0").undo)
    assert running.bitmaps() == bitmaps
    assert running.known() == ({"c0"} if running.name is LIBVIRT else set())
    assert str(socket) in machine.domain.backupGetXMLDesc()
    machine.domain.abortJob()


def test_the_question_whether_a_server_runs_leaves_it_no_client(make_vm: MakeMachine) -> None:
    """QEMU stands still for ever when a server is stopped that has a client yet to negotiate."""
    machine = make_vm([DiskSpec("vda")])
    socket = machine.folder / "nbd"
    assert not listening(str(socket))
    server = {"type": "unix", "data": {"path": str(socket)}}
    machine.qmp("nbd-server-start", addr=server)
    with ThreadPoolExecutor(1) as pool:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            asked = pool.submit(listening, str(socket))
            time.sleep(0.5)
            told_too_early = asked.done()
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert asked.result()
    assert not told_too_early
    machine.qmp("nbd-server-stop")
    assert not listening(str(socket))


def test_a_bitmap_of_the_name_belongs_to_somebody_else_and_stays(running: Driver) -> None:
    running.create("c0")
    plan = running.create_plan("c1", "c0")
    machine = running.machine
    machine.qmp("block-dirty-bitmap-add", node=machine.node("vdb"), name="c1", persistent=True)
    before = running.bitmaps()
    with pytest.raises(CheckpointExists):
        running.engine.run(plan.steps)
    running.engine.run(plan.release)
    assert running.bitmaps() == before
    assert "c1" not in running.known()


@pytest.mark.each_release
def test_a_bitmap_that_vanished_is_broken_and_not_clean(running: Driver) -> None:
    running.create("c0")
    plan, machine = running.create_plan("c1", "c0"), running.machine
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    with pytest.raises(BitmapBroken):
        running.engine.run(plan.steps)
    running.engine.run(plan.undo)
    assert {name for _, _, name in running.bitmaps()} <= {"c0"}


def test_a_checkpoint_that_libvirt_does_not_know_is_broken_for_it(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    Driver(machine, MONITOR).create("c0")
    with pytest.raises(BitmapBroken) as caught:
        Driver(machine, LIBVIRT).create("c1", "c0")
    assert caught.value.disk == "vda"


def test_an_image_in_use_elsewhere_leaves_every_image_unchanged(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:2], state="stopped"), OFFLINE)
    driver.create("c0")
    before = {path: path.read_bytes() for path in driver.machine.images.values()}
    with holding(driver.machine.images["vdb"]), pytest.raises(Busy, match=r"vdb\.qcow2"):
        driver.create("c1", "c0")
    with holding(driver.machine.images["vdb"]), pytest.raises(Busy, match=r"vdb\.qcow2"):
        driver.engine.run(driver.delete_plan("c0").steps)
    assert {path: path.read_bytes() for path in driver.machine.images.values()} == before


@pytest.mark.each_release
def test_the_image_of_a_running_machine_is_in_use(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    image = str(machine.images["vda"])
    with pytest.raises(Busy):
        check_free("vda", image)
    with pytest.raises(Busy):
        OfflineEngine(DomainAdapter.find(stand.connection, machine.name)).run(
            [ImageBitmap("vda", image, "add", "c0")]
        )
    machine.stop()
    check_free("vda", image)


def test_reading_the_bitmap_of_an_image_in_use_is_refused(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:1], state="stopped"), OFFLINE)
    driver.create("c0")
    plan = driver.read_plan("c0")
    driver.machine.start()
    with pytest.raises(Busy):
        driver.engine.run(plan.steps)


def test_a_bitmap_that_is_not_offered_is_an_error(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "there"], check=True)
    export = Export("vda", "", "absent", 65536)
    with (
        serve("vda", str(image), "absent") as server,
        pytest.raises(BitmapBroken, match="absent"),
    ):
        read_dirty_map(server.socket, export, check=server.check)
    with serve("vda", str(image), "there") as server, pytest.raises(BitmapBroken, match="absent"):
        read_dirty_map(server.socket, export, check=server.check)


@pytest.mark.parametrize("name", ["a,b.qcow2", "nbd:x", '-f "q"', "a:b=c,d", "žluťoučký <&>"])
def test_offline_takes_any_file_name(name: str, stand: Stand, make_vm_on: MakeMachine) -> None:
    folder = stand.workspace.folder("n")
    image = folder / name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "x", "64M"], check=True, cwd=folder)
    (folder / "x").rename(image)
    driver = Driver(make_vm_on(stand, (DiskSpec("vda", image=image),), state="stopped"), OFFLINE)
    driver.create("-f")
    command = ["qemu-io", "-c", "write 1M 64k", image_name(str(image))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert extents(driver.create("--all", "-f").maps) == {"vda": [(MIB, 65536)]}
    driver.engine.run(driver.delete_plan("-f").steps)
    assert {bitmap for _, _, bitmap in driver.bitmaps()} == {"--all"}


def test_offline_without_qemu_img_says_what_to_install(
    stand: Stand, make_vm_on: MakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:1], state="stopped"), OFFLINE)
    plan = driver.create_plan("c0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="qemu-img") as caught:
        driver.engine.run(plan.steps)
    assert "qemu-utils" in str(caught.value.hint)


def test_the_libvirt_engine_does_not_use_the_monitor(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS)
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    driver.create("c1", "c0")
    driver.read("c1")
    driver.engine.run(driver.delete_plan("c0").steps)
    driver.engine.run(driver.create_plan("c2", "c1").undo)
    assert not [text for text in machine.domain.messages(0) if "monitor" in text]
    machine.qmp("query-status")
    assert [text for text in machine.domain.messages(0) if "monitor" in text]
