"""What the writer of images writes, as QEMU's own programs read it; and the reading over NBD."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr.backup.block import BLOCK, ZERO, block_count, digest
from ckptmgr.backup.copying import Source, read_blocks
from ckptmgr.backup.digests import Digests, DigestWriter
from ckptmgr.backup.images import ImageFile, read_images
from ckptmgr.backup.qcow2 import Qcow2Writer
from ckptmgr.errors import RepositoryDamaged
from integration.stand import await_greeting

SLOW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

Step = tuple[str, int, int]
"""What is written, how many blocks are left out before it, how many it has."""

steps = st.lists(
    st.tuples(
        st.sampled_from(["data", "zero", "text", "noise"]),
        st.sampled_from([0, 0, 0, 1, 3, 200]),
        st.integers(1, 40),
    ),
    max_size=12,
)


def content(kind: str, seed: int) -> bytes:
    """A block."""
    if kind == "text":
        return (b"%d all work and no play " % seed * BLOCK)[:BLOCK]
    return random.Random(seed).randbytes(BLOCK)


def write(path: Path, size: int, planned: list[Step], disk: bytearray, backing: str | None) -> None:
    """Write an image as planned, and the same to `disk`."""
    writer = Qcow2Writer(path, size, backing=backing, compressed=True)
    digests = DigestWriter(path.with_suffix(".digests"), size)
    compressor = zstandard.ZstdCompressor(level=1)
    block = 0
    for kind, gap, count in planned:
        first = block + gap
        count = min(count, block_count(size) - first)
        if count <= 0:
            break
        block = first + count
        start, end = first * BLOCK, min((first + count) * BLOCK, size)
        blocks = [content(kind, number) for number in range(first, first + count)]
        data = bytes(end - start) if kind == "zero" else b"".join(blocks)[: end - start]
        disk[start:end] = data
        for number in range(first, first + count):
            held = bytes(disk[number * BLOCK : min((number + 1) * BLOCK, size)])
            if any(held):
                digests.add(number, digest(held))
            else:
                digests.zero(number, 1)
        if kind == "zero":
            writer.zero(first, count)
        elif kind == "text" and end - start == count * BLOCK:
            writer.write_compressed(first, [compressor.compress(each) for each in blocks])
        else:
            writer.write(first, memoryview(data))
    assert writer.close() == path.stat().st_size
    digests.close()


def seen(path: Path) -> bytes:
    """The disk in an image, as QEMU reads it."""
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


@SLOW
@given(
    size=st.sampled_from([BLOCK, 40 * BLOCK, 500 * BLOCK - 512, 1000 * BLOCK + 512]),
    below=steps,
    above=steps,
)
def test_qemu_reads_what_was_written(
    size: int, below: list[Step], above: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("images")
    disk = bytearray(size)
    (folder / "below").mkdir()
    (folder / "above").mkdir()
    write(folder / "below/vda.qcow2", size, below, disk, None)
    assert seen(folder / "below/vda.qcow2") == disk
    write(folder / "above/vda.qcow2", size, above, disk, "../below/vda.qcow2")
    assert seen(folder / "above/vda.qcow2") == disk
    assert read_as_files(folder, "above/vda", "below/vda") == disk


def read_as_files(folder: Path, *names: str) -> bytes:
    """The disk in a chain of images, read without QEMU and compared with the digests."""
    with contextlib.ExitStack() as stack:
        digests = [stack.enter_context(Digests(folder / f"{name}.digests")) for name in names]
        images = [
            stack.enter_context(ImageFile(folder / f"{name}.qcow2", each.size))
            for name, each in zip(names, digests, strict=True)
        ]
        disk = bytearray(images[0].size)

        def consume(first: int, data: memoryview, found: Sequence[bytes], layer: int) -> None:
            if list(found) != digests[layer].of(first, len(found)):
                raise RepositoryDamaged("a block is not what it was")
            disk[first * BLOCK : first * BLOCK + len(data)] = data

        read_images(images, digests, consume)
        return bytes(disk)


@SLOW
@given(
    planned=steps.filter(bool),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=40),
    cut=st.none() | st.floats(0, 1),
)
def test_a_damaged_image_is_never_read_as_another_disk(
    planned: list[Step],
    damage: list[tuple[float, int]],
    cut: float | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    size = 500 * BLOCK - 512
    disk = bytearray(size)
    write(folder / "vda.qcow2", size, planned, disk, None)
    path = folder / "vda.qcow2"
    content = bytearray(path.read_bytes())
    for place, bits in damage:
        # Mostly where the tables are: at the end, and in the header.
        at = int(place * 200) if place < 0.3 else int(len(content) * place**0.1) % len(content)
        content[at] ^= bits
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    with contextlib.suppress(RepositoryDamaged):
        assert read_as_files(folder, "vda") == disk


def test_an_image_may_span_many_tables_and_refcount_blocks(tmp_path: Path) -> None:
    """More than 2 GiB of clusters and 5 TiB of disk: every kind of table has a successor."""
    size = 5 << 40
    path = tmp_path / "large.qcow2"
    writer = Qcow2Writer(path, size, compressed=True)
    frame = zstandard.ZstdCompressor().compress(b"x" * BLOCK)
    # Sparse data: a file's zeroes cost nothing, and the clusters are there all the same.
    expected = 0
    for first in range(0, 5 << 24, 1 << 22):
        writer.write_compressed(first, [frame] * 100)
        writer.write(first + 100, memoryview(b"y" * BLOCK))
        expected += 101
    for first in range((5 << 24) - 40000, (5 << 24) - 16, 16):
        writer.write(first, memoryview(bytes(16 * BLOCK)))
        expected += 16
    writer.close()
    said = json.loads(
        subprocess.run(
            ["qemu-img", "check", "--output=json", str(path)], check=True, capture_output=True
        ).stdout
    )
    assert said.get("corruptions", 0) == said.get("leaks", 0) == said["check-errors"] == 0
    assert said["allocated-clusters"] == expected
    assert said["compressed-clusters"] == 20 * 100


@contextlib.contextmanager
def served(path: Path, folder: Path, form: str) -> Iterator[str]:
    """A raw file or an image, over NBD."""
    socket = str(folder / "nbd.sock")
    server = subprocess.Popen(
        ["qemu-nbd", "--read-only", "-f", form, "--socket", socket, "--persistent", str(path)]
    )
    try:
        await_greeting(Path(socket), server)
        yield socket
    finally:
        server.terminate()
        server.wait()


@SLOW
@given(
    runs=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=6), odd=st.booleans()
)
def test_blocks_are_read_in_order_with_their_digests(
    runs: list[tuple[int, int]], odd: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("nbd")
    size = 300 * BLOCK + (512 if odd else 0)
    path = folder / "disk"
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(0, 300, 7):
            file.seek(number * BLOCK + 100)
            file.write(os.urandom(3 * BLOCK))
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    asked: list[tuple[int, int]] = []
    last = 0
    for gap, count in runs:
        asked.append((last + gap, count))
        last += gap + count
    wanted = [n for first, count in asked for n in range(first, first + count) if n * BLOCK < size]
    found: list[int] = []

    def consume(first: int, view: memoryview, digests: object) -> None:
        assert isinstance(digests, list)
        assert bytes(view) == data[first * BLOCK : first * BLOCK + len(view)]
        for number, told in enumerate(digests, first):
            block = data[number * BLOCK : (number + 1) * BLOCK]
            assert told == (digest(block) if any(block) else ZERO)
            found.append(number)

    def zero(first: int, count: int) -> None:
        for number in range(first, first + count):
            assert not any(data[number * BLOCK : (number + 1) * BLOCK])
            found.append(number)

    done: list[int] = []
    with served(path, folder, "raw") as socket, Source(socket, "", "vda") as source:
        read_blocks(source, asked, consume, zero, progress=done.append)
    assert found == wanted
    assert sum(done) == sum(min(BLOCK, size - number * BLOCK) for number in wanted)


def test_a_failure_of_the_reader_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (200 * BLOCK))

    def consume(first: int, view: memoryview, digests: object) -> None:
        if first >= 32:
            raise OSError(28, "No space left on device")

    for _ in range(20):  # more than there are buffers
        with (
            served(path, tmp_path, "raw") as socket,
            Source(socket, "", "vda") as source,
            pytest.raises(OSError, match="No space left"),
        ):
            read_blocks(source, [(0, 200)], consume, lambda first, count: None)
