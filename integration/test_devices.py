"""Disks on block devices: they are tracked, backed up and restored, and never taken from others."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.domain import devices
from ckptmgr.engine.qemu_img import image_name
from integration.conftest import MakeMachine
from integration.devices import loop_device, other_node
from integration.first_thread import without_first_thread
from integration.stand import Daemon, DiskSpec, Machine, rounded
from integration.test_backup import Backups, modes

MIB = 1 << 20

pytestmark = pytest.mark.not_on_stacks("they have no loop devices")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 24 MiB."""
    with loop_device(tmp_path / "storage", 24 * MIB) as device:
        yield device


@pytest.fixture
def qcow2(device: Path) -> DiskSpec:
    """A disk of 16 MiB, qcow2 on a block device."""
    size = 16 * MIB
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", device, str(size)], check=True)
    return DiskSpec("vda", size=size, image=device)


@pytest.fixture
def volume(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> Iterator[Machine]:
    """A running machine whose disk is a volume of a pool."""
    folder = tmp_path / "pool"
    folder.mkdir()
    image = folder / "v.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    pool = daemon.handle.storagePoolCreateXML(
        f"<pool type='dir'><name>volumes</name><target><path>{folder}</path></target></pool>"
    )
    try:
        disk = DiskSpec("vda", size=16 * MIB, image=image, volume=("volumes", image.name))
        yield make_vm_on(daemon, [disk], state="running")
    finally:
        pool.destroy()


@contextlib.contextmanager
def written_by_another(node: Path, format: str) -> Iterator[None]:
    """A QEMU program that has the image open, and has written to it."""
    command = ["qemu-io", image_name(str(node), format)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("write -P 7 8M 64k\n")
        program.stdin.flush()
        assert "wrote 65536/65536" in program.stdout.readline()
        yield
    assert program.returncode == 0


def test_qcow2_on_a_device_is_tracked_and_backed_up(
    make_vm: MakeMachine, qcow2: DiskSpec, tmp_path: Path
) -> None:
    """Running and shut off; what is written there meanwhile is what is copied."""
    backups = Backups(make_vm([qcow2], state="running"), tmp_path)
    machine = backups.machine
    machine.write("vda", 0, MIB, 1)
    made = [backups.take("full")]
    machine.write("vda", 3 * MIB, 4096, 2)
    assert machine.bitmaps("vda")["full"]["count"] == 65536
    made.append(backups.take("running"))
    machine.write("vda", 5 * MIB, 4096, 3)
    machine.stop()
    assert set(machine.bitmaps("vda")) == {"full", "running"}
    with backups.domain() as domain:
        domain.create("stopped")
        machine.write("vda", 9 * MIB, MIB, 4)
        (since,) = domain.diff("stopped").disks
        assert since.extents() == rounded([(9 * MIB, MIB)])
        (both,) = domain.diff("running").disks
        assert both.extents() == rounded([(5 * MIB, 4096), (9 * MIB, MIB)])
        assert domain.archive(1) == {"full": ("vda",), "running": ("vda",)}
        domain.delete("full")
        assert domain.check() == ()
    assert set(machine.bitmaps("vda")) == {"stopped"}
    made.append(backups.take("shut-off"))
    assert [modes(each)["vda"] for each in made] == ["full", "incremental", "incremental"]
    assert all(each.disks[0].reason is None for each in made[1:])
    backups.check(*made)
    backups.crash()
    assert machine.bitmaps("vda") == {}


def test_a_bitmap_for_which_a_device_has_no_room_is_no_checkpoint(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """qemu-img reports success."""
    size = 4 * MIB
    with loop_device(tmp_path / "storage", size + 9 * 65536) as device:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", device, str(size)], check=True)
        backups = Backups(
            make_vm([DiskSpec("vda", size=size, image=device)], state="stopped"), tmp_path
        )
        backups.machine.write("vda", 0, size)
        with backups.domain() as domain:
            domain.create("fits")
            with pytest.raises(ckptmgr.OperationFailed, match="No space left on device") as raised:
                domain.create("does-not")
            assert "larger volume" in str(raised.value.hint)
            assert [each.name for each in domain.checkpoints().checkpoints] == ["fits"]
            assert not domain.diff("fits").disks[0].known
            domain.repair()
            assert domain.check() == ()
        assert "does-not" not in backups.machine.bitmaps("vda")
        backups.check(backups.take("read-whole", full=True, disks=("vda",)))


def test_a_device_that_another_node_was_opened_of_is_in_use(
    make_vm: MakeMachine, qcow2: DiskSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt gives each QEMU a /dev with nodes of its own, on which its locks are."""
    monkeypatch.setattr(devices, "PASSING", 0.1)
    backups = Backups(make_vm([qcow2], state="stopped"), tmp_path)
    device = backups.machine.images["vda"]
    backups.take("full")
    catalogue = ckptmgr.repository(backups.repository)
    with other_node(device, tmp_path / "qemu") as node, written_by_another(node, "qcow2"):
        before = device.read_bytes()
        with pytest.raises(ckptmgr.Busy, match="in use"):
            catalogue.restore(backups.machine.name, "full", onto={"vda": device})
        with backups.domain() as domain:
            with pytest.raises(ckptmgr.Busy, match="in use"):
                domain.create("c1")
            with pytest.raises(ckptmgr.Busy, match="in use"):
                domain.delete("full")
            assert "image-in-use" in [each.code for each in domain.check()]
        assert device.read_bytes() == before


def test_a_device_is_held_until_the_last_thread_of_a_process_has_ended(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed may still write when its first thread is gone."""
    monkeypatch.setattr(devices, "PASSING", 0.1)
    number = device.stat().st_rdev
    with without_first_thread(device):
        assert devices.is_held(number)
        assert devices.is_held(number, writing=True)
    assert not devices.is_held(number, writing=True)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_device_that_is_written_while_it_is_backed_up_makes_no_point(
    make_vm: MakeMachine,
    qcow2: DiskSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ended: bool,
    format: str,
) -> None:
    """No lock keeps a QEMU with a /dev of its own from a disk that is read while shut off."""
    if not ended:
        monkeypatch.setattr(devices, "PASSING", 0.1)
    tracked = DiskSpec("vdb", size=4 * MIB)
    disk = qcow2 if format == "qcow2" else DiskSpec("vda", "raw", image=qcow2.image)
    backups = Backups(make_vm([disk, tracked], state="stopped"), tmp_path)
    backups.take("before")
    with contextlib.ExitStack() as others:
        node = others.enter_context(other_node(backups.machine.images["vda"], tmp_path / "qemu"))
        began: list[str] = []

        def progress(disk: str, done: int, total: int) -> None:
            if disk == "vdb" and not began:
                began.append(disk)
                writer = written_by_another(node, format)
                if ended:
                    with writer:
                        pass
                else:
                    others.enter_context(writer)

        with pytest.raises(ckptmgr.Busy, match="opened or written while it was read"):
            backups.take("torn", held={}, progress=progress)
        assert began
    assert [point.name for point in ckptmgr.repository(backups.repository).points().points] == [
        "before"
    ]
    backups.check(backups.take("after"))


def test_a_volume_of_a_pool_is_tracked_backed_up_and_reverted(
    volume: Machine, tmp_path: Path
) -> None:
    """Running and shut off, by the path that its pool gives it."""
    backups = Backups(volume, tmp_path)
    made = [backups.take("running")]
    with backups.domain() as domain:
        domain.create_snapshot("s1")
        volume.write("vda", MIB, MIB, 5)
        returned = domain.revert_snapshot("s1")
        assert returned.parent == "running"
    volume.stop()
    with backups.domain() as domain:
        domain.create("stopped")
        volume.write("vda", 3 * MIB, 4096, 6)
        (since,) = domain.diff("stopped").disks
        assert since.extents() == rounded([(3 * MIB, 4096)])
        made.append(backups.take("shut-off"))
        domain.delete("stopped")
        assert domain.check() == ()
        domain.delete_snapshot("s1")
        domain.restore(backups.repository, "running")
    assert volume.contents("vda") == backups.held["running"]["vda"]
    assert modes(made[1]) == {"vda": "incremental"}
    assert made[1].disks[0].reason is None
    backups.check(*made)
