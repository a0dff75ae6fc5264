from __future__ import annotations

import itertools
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

nbd = pytest.importorskip("nbd")

import ckptmgr.nbd  # noqa: E402
from ckptmgr.nbd import ALLOCATION, connect, dirty_map, join  # noqa: E402

KIB = 1024
MIB = 1024 * KIB


def test_extents_split_by_replies_are_joined():
    runs = [(0, 10, True), (10, 5, True), (15, 5, False), (20, 5, True), (25, 5, True)]
    assert list(join(iter(runs))) == [(0, 15), (20, 10)]


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans())))
def test_joining_keeps_every_dirty_byte_and_adds_none(lengths):
    runs, position = [], 0
    for length, dirty in lengths:
        runs.append((position, length, dirty))
        position += length
    joined = list(join(iter(runs)))
    dirty_bytes = {
        n for start, length, dirty in runs if dirty for n in range(start, start + length)
    }
    assert {n for start, length in joined for n in range(start, start + length)} == dirty_bytes
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(joined))


def test_a_map_has_the_granularity_of_its_bitmap():
    assert dirty_map(4 * KIB, MIB, [(64 * KIB, 64 * KIB)]).granularity == 4 * KIB


@pytest.mark.parametrize("granularity", [None, 64 * KIB])
def test_a_granularity_that_cannot_be_right_loses_nothing(granularity):
    found = dirty_map(granularity, MIB, [(4 * KIB, 8 * KIB)])
    assert list(found.extents()) == [(4 * KIB, 8 * KIB)]


def test_the_last_granule_may_be_cut_by_the_end_of_the_disk():
    size = MIB + 512
    found = dirty_map(64 * KIB, size, [(MIB, 512)])
    assert found.granularity == 64 * KIB
    assert found.dirty_bytes == 512


def test_an_unknown_granularity_of_a_clean_or_wholly_dirty_disk_is_qemus_default():
    assert dirty_map(None, MIB, []).granularity == 64 * KIB
    assert dirty_map(None, MIB, [(0, MIB)]).granularity == 64 * KIB


@given(
    st.sampled_from([None, 512, 4096, 65536, 1 << 20]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=5),
)
def test_a_map_says_exactly_what_was_read(granularity, pieces):
    size = 200 * 4096 + 512
    dirty = set()
    for start, length in pieces:
        dirty.update(range(start, min(start + length, 201)))
    runs = ((n * 4096, min(4096, size - n * 4096), n in dirty) for n in range(201))
    extents = list(join(runs))
    assert list(dirty_map(granularity, size, extents).extents()) == extents


def test_a_server_that_goes_at_once_is_looked_after_as_one_that_never_came(monkeypatch):
    class Ended(Exception):
        pass

    def check() -> None:
        raise Ended

    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(folder, "nbd.sock")))
        listener.listen()
        begin = ckptmgr.nbd._begin

        def begin_and_lose(handle, server):
            begin(handle, server)
            listener.close()

        monkeypatch.setattr(ckptmgr.nbd, "_begin", begin_and_lose)
        with pytest.raises(Ended):
            connect(str(Path(folder, "nbd.sock")), "", "vda", ALLOCATION, check=check)
