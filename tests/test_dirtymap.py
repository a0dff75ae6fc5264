from __future__ import annotations

import hashlib
import itertools
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap64

from ckptmgr.dirtymap import MAGIC, DirtyMap, union
from ckptmgr.errors import StoreDamaged

from .strategies import dirty_maps

KIB = 1024
MIB = 1024 * KIB


def sectors(dirty: DirtyMap) -> set[int]:
    """The 512-byte sectors of the granules, one by one."""
    step = dirty.granularity // 512
    return {
        sector
        for granule in dirty.granules
        for sector in range(granule * step, (granule + 1) * step)
        if sector * 512 < dirty.size
    }


def sectors_of(extents: list[tuple[int, int]]) -> set[int]:
    return {
        sector
        for start, length in extents
        for sector in range(start // 512, (start + length) // 512)
    }


@given(dirty_maps())
def test_extents_cover_just_the_granules_merged_and_within_the_size(dirty: DirtyMap) -> None:
    extents = list(dirty.extents())
    assert sectors_of(extents) == sectors(dirty)
    assert dirty.dirty_bytes == sum(length for _, length in extents) == len(sectors(dirty)) * 512
    for (start, length), (following, _) in itertools.pairwise(extents):
        assert start + length < following
    assert all(length > 0 and start + length <= dirty.size for start, length in extents)
    assert dirty.is_empty is (not extents)


@given(dirty_maps())
def test_a_map_is_made_again_from_its_extents(dirty: DirtyMap) -> None:
    assert DirtyMap.from_extents(dirty.granularity, dirty.size, dirty.extents()) == dirty


@given(
    st.lists(st.tuples(st.integers(0, 300 * KIB), st.integers(0, 80 * KIB))),
    st.integers(0, 300 * KIB),
    st.sampled_from([512, 4096, 65536]),
)
def test_no_written_byte_is_lost_and_no_untouched_granule_is_dirty(
    extents: list[tuple[int, int]], size: int, granularity: int
) -> None:
    dirty = DirtyMap.from_extents(granularity, size, extents)
    touched = {
        granule
        for start, length in extents
        if length
        for granule in range(start // granularity, (start + length - 1) // granularity + 1)
        if max(start, granule * granularity) < size
    }
    assert set(dirty.granules) == touched


def test_the_last_granule_counts_up_to_the_size() -> None:
    dirty = DirtyMap(64 * KIB, 100 * KIB + 512, BitMap64([1]))
    assert list(dirty.extents()) == [(64 * KIB, 36 * KIB + 512)]
    assert dirty.dirty_bytes == 36 * KIB + 512


def test_a_granule_that_ends_with_the_disk_is_not_clipped() -> None:
    assert DirtyMap(64 * KIB, 128 * KIB, BitMap64([0, 1])).dirty_bytes == 128 * KIB


@given(st.lists(dirty_maps(), min_size=1, max_size=4))
def test_union_says_the_same_bytes_at_the_finest_granularity(maps: list[DirtyMap]) -> None:
    result = union(maps)
    size = max(part.size for part in maps)
    grown = {sector for part in maps for sector in range(part.size // 512, size // 512)}
    expected = set().union(*(sectors(part) for part in maps)) | grown
    assert result.granularity == min(part.granularity for part in maps)
    assert result.size == size
    step = result.granularity // 512
    rounded = {
        sector
        for one in expected
        for sector in range(one // step * step, (one // step + 1) * step)
        if sector * 512 < size
    }
    assert sectors(result) == rounded
    if all(part.size == size for part in maps):
        assert sectors(result) == expected


@given(dirty_maps(), dirty_maps())
def test_union_does_not_depend_on_the_order(one: DirtyMap, other: DirtyMap) -> None:
    assert one.union(other) == other.union(one)
    assert one.union(one) == one


def test_union_of_a_clipped_coarse_granule_does_not_reach_beyond_the_disk() -> None:
    coarse = DirtyMap(64 * KIB, 66 * KIB, BitMap64([1]))
    fine = DirtyMap(KIB, 66 * KIB, BitMap64([0]))
    assert list(coarse.union(fine).extents()) == [(0, KIB), (64 * KIB, 2 * KIB)]


def test_bytes_that_only_the_larger_disk_has_count_as_written() -> None:
    small = DirtyMap(64 * KIB, 64 * KIB, BitMap64())
    large = DirtyMap(64 * KIB, 256 * KIB, BitMap64())
    assert list(small.union(large).extents()) == [(64 * KIB, 192 * KIB)]


def test_a_shrunk_disk_forgets_what_it_lost() -> None:
    dirty = DirtyMap(64 * KIB, 256 * KIB, BitMap64([0, 1, 3])).resized(96 * KIB)
    assert list(dirty.extents()) == [(0, 96 * KIB)]


def test_a_coarser_granularity_is_refused_as_it_cannot_say_the_same() -> None:
    with pytest.raises(ValueError, match="cannot say the same"):
        DirtyMap(4096, MIB, BitMap64([1])).refined(65536)


def test_a_union_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        union([])


@pytest.mark.parametrize("granularity", [0, -512, 256, 511, 513, 3 * 512])
def test_a_granularity_that_qemu_cannot_have_is_refused(granularity: int) -> None:
    with pytest.raises(ValueError, match="granularity"):
        DirtyMap(granularity, MIB, BitMap64())


def test_granules_beyond_the_disk_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        DirtyMap(65536, MIB, BitMap64([16]))


def test_negative_extents_are_refused() -> None:
    for extent in ((-1, 5), (5, -1)):
        with pytest.raises(ValueError, match="not an extent"):
            DirtyMap.from_extents(512, MIB, [extent])


def test_a_map_does_not_change_with_the_set_it_was_made_from() -> None:
    granules = BitMap64([1])
    dirty = DirtyMap(512, MIB, granules)
    granules.add(2)
    assert dirty.dirty_bytes == 512


@given(dirty_maps())
def test_a_map_survives_its_file(dirty: DirtyMap) -> None:
    assert DirtyMap.deserialize(dirty.serialize()) == dirty


@given(dirty_maps())
def test_equal_maps_give_equal_files_however_they_were_made(dirty: DirtyMap) -> None:
    one_by_one = BitMap64()
    for granule in dirty.granules:
        one_by_one.add(granule)
    assert DirtyMap(dirty.granularity, dirty.size, one_by_one).serialize() == dirty.serialize()


@given(dirty_maps(), st.data())
def test_a_damaged_file_is_never_taken_for_another_map(
    dirty: DirtyMap, data: st.DataObject
) -> None:
    whole = dirty.serialize()
    broken = bytearray(whole)
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(whole) - 1))
        broken[position] ^= data.draw(st.integers(1, 255))
    else:
        broken = broken[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(StoreDamaged):
        DirtyMap.deserialize(bytes(broken))


@pytest.mark.parametrize(
    ("granularity", "size", "body"),
    [
        (1000, MIB, BitMap64().serialize()),
        (65536, 2**63, BitMap64().serialize()),
        (65536, MIB, BitMap64([16]).serialize()),
        (65536, MIB, b""),
        (65536, MIB, b"\1\0\0\0\0\0\0\0"),
    ],
    ids=["granularity", "size", "granule beyond the size", "no bitmap", "half a bitmap"],
)
def test_a_file_with_a_good_digest_and_impossible_content_is_refused(
    granularity: int, size: int, body: bytes
) -> None:
    content = MAGIC + struct.pack("<QQ", granularity, size) + body
    with pytest.raises(StoreDamaged):
        DirtyMap.deserialize(content + hashlib.sha256(content).digest())


def test_the_file_is_as_documented() -> None:
    data = DirtyMap(65536, MIB, BitMap64([0, 15])).serialize()
    assert data[:20] == b"ckptmgr dirty map 1\n"
    assert struct.unpack("<QQ", data[20:36]) == (65536, MIB)
    assert list(BitMap64.deserialize(data[36:-32])) == [0, 15]
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def test_extents_cost_by_the_run_not_by_the_granule() -> None:
    # 1 TiB in granules of 512 bytes: two thousand million granules, three runs.
    size = 1 << 40
    dirty = DirtyMap.from_extents(
        512, size, [(0, size // 2), (size // 2 + 512, 512), (size - 512, 512)]
    )
    started = time.process_time()
    assert [length for _, length in dirty.extents()] == [size // 2, 512, 512]
    assert time.process_time() - started < 1


def test_a_million_extents_take_seconds_not_minutes() -> None:
    dirty = DirtyMap(512, 1 << 40, BitMap64(range(0, 3_000_000, 3)))
    started = time.process_time()
    assert sum(1 for _ in dirty.extents()) == 1_000_000
    assert time.process_time() - started < 4


def test_a_map_of_a_terabyte_that_was_all_written_is_a_small_file() -> None:
    assert len(DirtyMap.from_extents(65536, 1 << 40, [(0, 1 << 40)]).serialize()) < 16 * KIB
