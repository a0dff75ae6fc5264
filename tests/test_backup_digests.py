"""Files of digests: what was written comes back, damage never does."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.backup.block import BLOCK, ZERO, block_count, block_length, digest
from ckptmgr.backup.digests import Digests, DigestWriter, block_set, effective, held, runs
from ckptmgr.errors import RepositoryDamaged, RepositoryFailed

from .repositories import write_digests

COUNT = 40

layers = st.dictionaries(
    st.integers(0, COUNT - 1), st.sampled_from([b"", b"one", b"two", b"three"]), max_size=COUNT
)
disk_sizes = st.integers(1, COUNT * BLOCK)


def within(layer: dict[int, bytes], size: int) -> dict[int, bytes]:
    return {block: content for block, content in layer.items() if block < block_count(size)}


@given(layers, disk_sizes)
def test_what_was_written_is_found(layer: dict[int, bytes], size: int) -> None:
    layer = within(layer, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vda.digests")
        write_digests(path, layer, size)
        with Digests(path) as found:
            assert found.size == size
            assert set(found.data) == {block for block, content in layer.items() if content}
            assert set(found.zero) == {block for block, content in layer.items() if not content}
            for block in [*range(COUNT + 2), 3, 1]:
                if block not in layer:
                    assert found.find(block) is None
                elif not layer[block]:
                    assert found.find(block) == ZERO
                else:
                    assert found.find(block) == digest(layer[block])


def test_a_run_is_written_as_its_blocks_one_by_one_are(tmp_path: Path) -> None:
    one, run = DigestWriter(tmp_path / "one", 9 * BLOCK), DigestWriter(tmp_path / "run", 9 * BLOCK)
    for first, found in ((1, [digest(b"a"), digest(b"b")]), (4, [ZERO, ZERO]), (8, [digest(b"c")])):
        for number, each in enumerate(found, first):
            one.add(number, each)
        run.extend(first, found)
    with pytest.raises(ValueError, match="digests"):
        run.extend(9, [digest(b"d"), ZERO])
    one.close()
    run.close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "run").read_bytes()


def test_a_layer_larger_than_what_is_read_ahead_is_found_in_any_order(tmp_path: Path) -> None:
    blocks = {block: b"%d" % block for block in range(0, 12000, 2)}
    write_digests(tmp_path / "d", blocks, 12000 * BLOCK)
    with Digests(tmp_path / "d") as found:
        for block in [*blocks, *reversed(blocks), 4094, 0, 11998, 4096]:
            assert found.find(block) == digest(blocks[block])
        assert found.of(3, 3) == [None, digest(b"4"), None]


@given(layers, disk_sizes, st.data())
def test_no_damaged_byte_and_no_cut_goes_unnoticed(
    layer: dict[int, bytes], size: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vda.digests")
        write_digests(path, within(layer, size), size)
        content = bytearray(path.read_bytes())
        match data.draw(st.sampled_from(["flip", "cut", "longer"])):
            case "flip":
                place = data.draw(st.integers(0, len(content) - 1))
                content[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[data.draw(st.integers(0, len(content) - 1)) :]
            case _:
                content += data.draw(st.binary(min_size=1, max_size=50))
        path.write_bytes(content)
        with pytest.raises(RepositoryDamaged, match=r"vda\.digests"):
            Digests(path)


@given(st.binary(max_size=400))
def test_a_seal_on_nonsense_makes_it_no_digests(nonsense: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vda.digests")
        for content in (nonsense, b"ckptmgr digests 1\n" + nonsense):
            path.write_bytes(content + hashlib.sha256(content).digest())
            with pytest.raises(RepositoryDamaged):
                Digests(path)


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "d"
    write_digests(path, dict.fromkeys(range(5000), b"x"), 5000 * BLOCK)
    with Digests(path) as found:
        os.truncate(path, 1000)
        with pytest.raises(RepositoryFailed, match="cannot be read"):
            found.find(4000)


@pytest.mark.parametrize("kind", ["missing", "link", "folder", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d"
    if kind == "link":
        write_digests(tmp_path / "there", {})
        path.symlink_to("there")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(RepositoryDamaged):
        Digests(path)


@pytest.mark.parametrize(
    "steps", [[(3, 1), (3, 1)], [(5, 1), (4, 1)], [(0, 9)], [(8, 1)], [(2, 3), (4, 1)]]
)
def test_blocks_out_of_order_or_beyond_the_disk_are_refused(
    tmp_path: Path, steps: Sequence[tuple[int, int]]
) -> None:
    writer = DigestWriter(tmp_path / "d", 8 * BLOCK - 1)
    with pytest.raises(ValueError, match="out of order or beyond"):
        for first, count in steps:
            writer.zero(first, count)
    writer.abandon()
    assert not (tmp_path / "d").exists()


@given(st.lists(st.tuples(layers, disk_sizes), min_size=1, max_size=5))
def test_what_is_held_and_what_is_effective_is_what_is_seen(
    stack: list[tuple[dict[int, bytes], int]],
) -> None:
    """Against the plain rule: the first layer that has the block, none below a smaller one."""
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number, (layer, size) in enumerate(stack):
            path = Path(folder, str(number))
            write_digests(path, within(layer, size), size)
            opened.append(Digests(path))
        expected: dict[int, tuple[int, bytes]] = {}
        for block in range(COUNT):
            for number, (layer, size) in enumerate(stack):
                if block >= block_count(size):
                    break
                if block in layer:
                    expected[block] = (number, layer[block])
                    break
        found: dict[int, tuple[int, bool]] = {}
        for each in held(opened):
            assert each.visible == min(size for _, size in stack[: each.index + 1])
            found |= dict.fromkeys(each.data, (each.index, True))
            found |= dict.fromkeys(each.zero, (each.index, False))
        assert found == {block: (at, bool(content)) for block, (at, content) in expected.items()}
        for block in range(COUNT):
            _, content = expected.get(block, (0, b""))
            assert effective(opened, block) == (digest(content) if content else ZERO)
        for each in opened:
            each.close()


@given(st.sets(st.integers(0, 200)))
def test_runs_are_the_set(blocks: set[int]) -> None:
    found = list(runs(block_set((block, 1) for block in blocks)))
    assert set(block_set(found)) == blocks
    assert all(first + count < after for (first, count), (after, _) in pairwise(found))


def test_lengths_of_blocks() -> None:
    assert [block_length(2 * BLOCK + 5, block) for block in range(4)] == [BLOCK, BLOCK, 5, 0]
    assert [block_count(size) for size in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]
