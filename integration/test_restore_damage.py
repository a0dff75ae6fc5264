"""restore on what is damaged, full, in use or too small: it is said, and nothing is harmed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup import images
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.catalogue import Catalogue
from ckptmgr.backup.volume import MARK
from ckptmgr.engine.qemu_img import image_name
from integration.conftest import MakeMachine
from integration.devices import loop_device
from integration.stand import DiskSpec, await_greeting
from integration.test_backup import Backups
from tests.restorable import content, restorable

MIB = 1 << 20


@pytest.fixture(name="catalogue")
def catalogue_fixture(tmp_path: Path) -> Catalogue:
    """monday <- tuesday, of half a MiB."""
    return ckptmgr.repository(restorable(tmp_path / "repo").path.parent)


def image(catalogue: Catalogue, point: str) -> Path:
    return next(catalogue.path.glob(f"*/{point}/vda.qcow2"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """Change one bit in the middle of the first block of data, which is the second cluster."""
    with path.open("r+b") as file:
        file.seek(BLOCK + 1000)
        byte = file.read(1)[0]
        file.seek(BLOCK + 1000)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("point", ["monday", "tuesday"])
def test_what_is_whole_comes_back(catalogue: Catalogue, tmp_path: Path, point: str) -> None:
    volume = tmp_path / "volume"
    volume.write_bytes(os.urandom(MIB))
    catalogue.restore("web", point, onto={"vda": volume})
    data = content(point)
    assert volume.read_bytes() == data + bytes(MIB - len(data))


def test_a_flipped_bit_is_told_with_its_place_and_nothing_looks_restored(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    flip(image(catalogue, "tuesday"))
    with pytest.raises(ckptmgr.RepositoryDamaged) as raised:
        catalogue.restore("web", "tuesday", tmp_path / "to", flatten=True)
    assert "restore point tuesday is damaged: disk vda is not what it was at offset 0" in str(
        raised.value
    )
    assert not (tmp_path / "to").exists()
    done = catalogue.restore("web", "monday", tmp_path / "to", flatten=True)
    assert len(done.disks) == 2


def test_damage_below_is_told_of_the_point_where_it_is(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    path = image(catalogue, "monday")
    data = bytearray(path.read_bytes())
    place = data.find(content("monday")[5 * BLOCK : 5 * BLOCK + 64])
    data[place] ^= 0x80
    path.write_bytes(data)
    # tuesday has zeroes there of its own, so it is whole
    catalogue.restore("web", "tuesday", tmp_path / "whole", flatten=True)
    with pytest.raises(ckptmgr.RepositoryDamaged, match=f"offset {5 * BLOCK}; tuesday stands on"):
        catalogue.restore("web", "monday", tmp_path / "to", flatten=True)


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Have a byte of a file be on a sector that cannot be read."""

    def lose(path: Path, lost: int) -> None:
        there = path.stat().st_ino

        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if os.fstat(descriptor).st_ino == there and offset <= lost < offset + len(buffers[0]):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.preadv(descriptor, buffers, offset)

        system = SimpleNamespace(**{**vars(os), "preadv": preadv})
        monkeypatch.setattr(images, "os", system)

    return lose


def test_an_image_that_cannot_be_read_is_told_with_its_place(
    catalogue: Catalogue, tmp_path: Path, lose: Callable[[Path, int], None]
) -> None:
    """Nothing looks restored, and a volume says that it is half written."""
    path = image(catalogue, "monday")
    lose(path, path.read_bytes().index(content("monday")[5 * BLOCK : 5 * BLOCK + 64]) + 512)
    volume = tmp_path / "volume"
    volume.write_bytes(b"old" * BLOCK * 4)
    folder: dict[str, Any] = {"folder": tmp_path / "to", "flatten": True}
    for place, said in (
        (folder, ""),
        ({"onto": {"vda": volume}}, f"{volume} is half written"),
    ):
        with pytest.raises(ckptmgr.RepositoryFailed) as raised:
            catalogue.restore("web", "monday", **place)
        told = (
            "disk vda of restore point monday cannot be read: "
            f"{path} cannot be read from offset {5 * BLOCK} on: Input/output error"
        )
        assert told in raised.value.message
        assert said in raised.value.message
        assert "verify" in str(raised.value.hint)
    assert not (tmp_path / "to").exists()
    assert volume.read_bytes().startswith(MARK)
    # tuesday has zeroes there of its own
    catalogue.restore("web", "tuesday", tmp_path / "to", flatten=True)


def test_a_volume_on_which_damage_was_found_is_said_to_be_half_written(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    path = image(catalogue, "monday")
    data = bytearray(path.read_bytes())
    data[data.find(content("monday")[5 * BLOCK : 5 * BLOCK + 64])] ^= 0x80
    path.write_bytes(data)
    volume = tmp_path / "volume"
    volume.write_bytes(b"old" * BLOCK * 4)
    with pytest.raises(ckptmgr.RepositoryDamaged, match=f"{volume} is half written"):
        catalogue.restore("web", "monday", onto={"vda": volume})
    assert volume.read_bytes()[:BLOCK] == MARK.ljust(BLOCK, b"\0")
    assert b"old" not in volume.read_bytes()


def test_an_existing_qcow2_file_is_replaced_or_left(catalogue: Catalogue, tmp_path: Path) -> None:
    target = tmp_path / "v" / "disk.qcow2"
    target.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, "1G"], check=True)
    target.chmod(0o640)
    os.chown(target, 12345, 54321)
    before = target.read_bytes()
    flip(image(catalogue, "tuesday"))
    with pytest.raises(ckptmgr.RepositoryDamaged):
        catalogue.restore("web", "tuesday", onto={"vda": target})
    assert target.read_bytes() == before
    assert names(target.parent) == ["disk.qcow2"]
    (tmp_path / "link").symlink_to(target)
    done = catalogue.restore("web", "monday", onto={"vda": tmp_path / "link"})
    assert done.disks[0].file == str(target)
    status = target.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 12345, 54321)
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw], check=True)
    assert raw.read_bytes() == content("monday")
    assert names(target.parent) == ["disk.qcow2"]


def test_a_volume_that_is_in_use_or_too_small_is_refused(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"old" * 1000)
    with pytest.raises(ckptmgr.InvalidRequest, match="has 3000 bytes"):
        catalogue.restore("web", "monday", onto={"vda": small})
    used = tmp_path / "used"
    used.write_bytes(b"old" * BLOCK * 4)
    socket = tmp_path / "socket"
    server = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--socket", socket, "--", image_name(str(used), "raw")]
    )
    try:
        await_greeting(socket, server)
        with pytest.raises(ckptmgr.Busy, match="in use"):
            catalogue.restore("web", "monday", onto={"vda": used})
    finally:
        server.terminate()
        server.wait()
    assert used.read_bytes() == b"old" * BLOCK * 4
    assert small.read_bytes() == b"old" * 1000


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_file_system_keeps_what_it_has(catalogue: Catalogue, tmp_path: Path) -> None:
    with mounted(tmp_path / "full", 3 * BLOCK) as full:
        (full / "mine").write_bytes(b"mine")
        with pytest.raises(ckptmgr.RestoreFailed, match="No space left") as raised:
            catalogue.restore("web", "monday", full / "to", flatten=True)
        assert raised.value.hint is not None
        assert names(full) == ["mine"]
        volume = full / "volume"
        with volume.open("wb") as file:
            file.truncate(MIB)
        with pytest.raises(ckptmgr.RestoreFailed, match=r"No space left.*half written"):
            catalogue.restore("web", "monday", onto={"vda": volume})


@pytest.mark.parametrize("extra", [0, 512, 3 * BLOCK + 512])
def test_a_block_device_is_written_from_end_to_end(
    catalogue: Catalogue, tmp_path: Path, extra: int
) -> None:
    data = content("tuesday")
    backing = tmp_path / "backing"
    backing.write_bytes(random.Random(extra).randbytes(len(data) + extra))
    with loop_device(backing) as device:
        done = catalogue.restore("web", "tuesday", onto={"vda": device})
        assert done.disks[0].format == "raw"
        assert device.read_bytes() == data + bytes(extra)


def test_a_point_in_the_middle_that_is_gone_is_told(make_vm: MakeMachine, tmp_path: Path) -> None:
    backups = Backups(make_vm([DiskSpec("vda", size=4 * MIB)], state="running"), tmp_path)
    for number, name in enumerate(("one", "two", "three")):
        backups.machine.write("vda", number * 65536, 65536, number + 1)
        backups.take(name)
    (lost,) = backups.repository.glob("*/two")
    lost.rename(tmp_path / "two")
    catalogue = ckptmgr.repository(backups.repository)
    for flatten in (False, True):
        with pytest.raises(ckptmgr.RepositoryDamaged, match="stands on two, which is missing"):
            catalogue.restore(backups.machine.name, "three", tmp_path / "to", flatten=flatten)
        catalogue.restore(backups.machine.name, "one", tmp_path / f"one-{flatten}", flatten=flatten)
    assert not (tmp_path / "to").exists()
    backups.machine.stop()
    before = backups.machine.contents("vda")
    with backups.domain() as domain:
        with pytest.raises(ckptmgr.RepositoryDamaged, match="stands on two, which is missing"):
            domain.restore(backups.repository, "three")
        current = domain.current()
    assert current is not None
    assert current.name == "three"
    assert backups.machine.contents("vda") == before
