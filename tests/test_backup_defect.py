"""Finding the place at which a disk cannot be read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.backup.defect import SECTOR, Extent, search

MIB = 1 << 20


@given(
    lengths=st.lists(st.integers(1, 2 * MIB // SECTOR), min_size=1, max_size=8),
    gap=st.integers(0, 64),
    last=st.integers(1, SECTOR),
    lost=st.sets(st.integers(0, 16 * MIB // SECTOR), max_size=4),
)
def test_the_first_sector_that_is_lost_is_found(
    lengths: list[int], gap: int, last: int, lost: set[int]
) -> None:
    """last -- bytes of the last sector that was asked for: disks may end within one"""
    extents: list[Extent] = []
    start = 0
    for length in lengths:
        extents.append((start * SECTOR, length * SECTOR))
        start += length + gap
    begin, length = extents[-1]
    extents[-1] = begin, length - SECTOR + last
    asked = 0

    def is_read(extent: Extent) -> bool:
        nonlocal asked
        asked += 1
        begin, length = extent
        return not any(
            begin < (each + 1) * SECTOR and each * SECTOR < begin + length for each in lost
        )

    found = search(is_read, extents)
    seen = [
        each * SECTOR
        for each in sorted(lost)
        if any(begin <= each * SECTOR < begin + length for begin, length in extents)
    ]
    if not seen:
        assert found is None
        return
    assert found is not None
    assert found[0] == seen[0]
    assert found[1] <= SECTOR
    assert asked <= len(extents) + 12


def test_where_time_is_short_it_is_said_what_is_known() -> None:
    answers = iter([True, False, False, None])
    assert search(lambda extent: next(answers), [(0, MIB), (MIB, MIB)]) == (MIB, MIB // 2)
    assert search(lambda extent: None, [(0, MIB)]) is None
