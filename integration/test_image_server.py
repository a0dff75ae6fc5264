"""An image is served as it reads, with its chain or by itself; what is wrong with it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.copying import Source, read_blocks
from ckptmgr.backup.qcow2 import Qcow2Writer
from ckptmgr.engine.qemu_img import serve_image
from ckptmgr.errors import OperationFailed


def chain(folder: Path) -> Path:
    """Three blocks, of which the top image holds the second, and the third as zeroes."""
    for name in ("below", "top"):
        (folder / name).mkdir()
    writer = Qcow2Writer(folder / "below/vda.qcow2", 3 * BLOCK)
    writer.write(0, memoryview(b"b" * 3 * BLOCK))
    writer.close()
    path = folder / "top/vda.qcow2"
    writer = Qcow2Writer(path, 3 * BLOCK, backing="../below/vda.qcow2")
    writer.write(1, memoryview(b"t" * BLOCK))
    writer.zero(2, 1)
    writer.close()
    return path


def read(path: Path, *, chain: bool) -> bytes:
    disk = bytearray(3 * BLOCK)

    def consume(first: int, data: memoryview, digests: object) -> None:
        disk[first * BLOCK : first * BLOCK + len(data)] = data

    with (
        serve_image("vda", str(path), chain=chain) as server,
        Source(server.socket, "", "vda", check=server.check) as source,
    ):
        read_blocks(source, [(0, 3)], consume, lambda first, count: None)
    return bytes(disk)


def test_an_image_is_read_with_its_chain_and_by_itself(tmp_path: Path) -> None:
    path = chain(tmp_path)
    assert read(path, chain=True) == b"b" * BLOCK + b"t" * BLOCK + bytes(BLOCK)
    assert read(path, chain=False) == bytes(BLOCK) + b"t" * BLOCK + bytes(BLOCK)


def test_an_image_that_cannot_be_opened_is_told_with_the_reason(tmp_path: Path) -> None:
    path = chain(tmp_path)
    (tmp_path / "below/vda.qcow2").unlink()
    with pytest.raises(OperationFailed, match=r"disk vda from .*top/vda\.qcow2.*No such file"):
        read(path, chain=True)
    path.write_bytes(b"something else")
    with pytest.raises(OperationFailed, match="not in qcow2 format"):
        read(path, chain=True)
    path.unlink()
    with pytest.raises(OperationFailed, match="No such file"):
        read(path, chain=True)
