"""A disk that cannot be read: its backup fails whole, says where, and harms nothing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from ckptmgr import nbd as nbd_client
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.copying import Source, read_blocks
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.evidence import everything
from integration.failing_disk import FailingDisk, failing_disk
from integration.stand import MIB, Daemon, DiskSpec
from integration.stand.images import await_greeting
from integration.test_backup import Backups
from integration.test_backup_faults import clean, quiet, sound, whole

SIZE = 4 * MIB
LOST = MIB + 32 * 1024 + 100
"""A byte of the sector that cannot be read."""


@pytest.fixture
def lower(tmp_path: Path) -> Iterator[FailingDisk]:
    with failing_disk(tmp_path, bytes(range(256)) * (SIZE // 256)) as disk:
        yield disk


@pytest.mark.parametrize("engine", ["libvirt", "monitor", "offline"])
def test_a_sector_that_cannot_be_read_fails_the_backup_and_costs_no_interval(
    engine: str, daemon: Daemon, make_vm_on: MakeMachine, lower: FailingDisk, tmp_path: Path
) -> None:
    """Neither in a full one nor in an increment; once it can be read, both periods are in the next.

    The clusters are smaller than the blocks of a backup, so what the guest writes beside the sector
    has that read as well.
    """
    image = tmp_path / "vda.qcow2"
    options = f"backing_file={lower.uri},backing_fmt=raw,cluster_size=4096"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE)], check=True
    )
    disks = [DiskSpec("vda", size=SIZE, image=image), DiskSpec("vdb", size=MIB)]
    offline = engine == "offline"
    vm = Backups(make_vm_on(daemon, disks, state="stopped" if offline else "running"), tmp_path)
    vm.engine = engine
    ours = CommandLine(daemon, vm.store)
    name = vm.machine.name

    def fails(point: str, *points: str) -> None:
        lower.lose(LOST)
        before = everything(vm.machine, vm.store)
        ran = ours("--engine", engine, "backup", name, vm.repository, point)
        assert ran.status == 1, ran.err
        error, hint = [line for line in ran.err.splitlines() if "warning" not in line]
        assert error.startswith("ckptmgr: error: ")
        where = f"domain '{name}': disk vda cannot be read at offset {LOST // 512 * 512}: "
        assert where in error
        assert "Input/output error" in error
        assert "log of the host's kernel" in hint
        assert "--disk" in hint
        assert everything(vm.machine, vm.store) == before
        if points:
            whole(vm.repository, *points)
        else:
            assert [path.name for path in vm.repository.rglob("*") if path.name != "lock"] == [
                vm.machine.domain.UUIDString()
            ]
        if not offline:
            quiet(vm.machine)
            assert vm.machine.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING

    fails("none")
    lower.lose()
    first = vm.take("first")
    vm.scatter(1)
    vm.machine.write("vda", MIB + 4096, 4096)
    fails("second", "first")
    # Of the other disk there can be one, as the hint says.
    lower.lose()
    held = vm.contents()
    lower.lose(LOST)
    other = vm.take("other", held=held, disks=("vdb",))
    lower.lose()
    vm.scatter(2)
    clean(vm)
    third = vm.take("third")
    assert [(disk.name, disk.mode, disk.reason) for disk in third.disks] == [
        ("vda", "incremental", None),
        ("vdb", "incremental", None),
    ]
    assert [disk.base for disk in third.disks] == ["first", "other"]
    vm.check(first, other, third)
    sound(vm.repository)
    clean(vm)


def test_tables_of_an_image_that_cannot_be_read_are_told_with_their_place(tmp_path: Path) -> None:
    """QEMU is asked what reads as zeroes before it is asked for data."""
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    subprocess.run(["qemu-io", "-c", f"write {MIB} {MIB}", image], check=True, capture_output=True)
    with failing_disk(tmp_path, image.read_bytes()) as lower:
        socket = tmp_path / "nbd.sock"
        command = ["qemu-nbd", "--read-only", "--persistent", "-f", "qcow2", f"--socket={socket}"]
        server = subprocess.Popen([*command, lower.uri])
        try:
            await_greeting(socket, server)
            lower.lose(4 * BLOCK)  # after the header, two tables of refcounts, and the first of two
            with (
                Source(str(socket), "", "vda") as source,
                pytest.raises(ckptmgr.OperationFailed) as caught,
            ):
                read_blocks(source, [(2, 62)], lambda *_: None, lambda *_: None)
        finally:
            server.kill()
            server.wait()
    assert caught.value.message == (
        f"disk vda cannot be read between the offsets {2 * BLOCK} and {SIZE}: Input/output error"
    )


def test_storage_that_does_not_answer_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, socket = tmp_path / "image", tmp_path / "nbd.sock"
    image.write_bytes(b"x" * MIB)
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", f"--socket={socket}", image])
    try:
        await_greeting(socket, server)
        with (
            Source(str(socket), "", "vda") as source,
            pytest.raises(ckptmgr.OperationFailed, match="did not answer in time"),
        ):
            server.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(nbd_client, "ANSWER_TIMEOUT", 0.5)
            read_blocks(source, [(0, 16)], lambda *_: None, lambda *_: None)
    finally:
        server.kill()
        server.wait()
