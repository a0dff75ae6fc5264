"""Checkpoints of a real Linux guest that writes its disks, with nothing simulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr
from integration.stand import MIB, DiskSpec, Guest, Stand, rounded

GRANULARITY = 65536
SIZE = 1024 * MIB


@pytest.fixture
def guest(local: Stand) -> Iterator[Guest]:
    """Linux with a large qcow2 disk and one on a backing file."""
    disks = (DiskSpec("vda", size=SIZE), DiskSpec("vdb", backing=("qcow2",)))
    with Guest(local, disks) as guest:
        yield guest


@pytest.mark.each_release
def test_diff_is_exactly_what_the_guest_wrote_between_checkpoints(
    guest: Guest, tmp_path: Path
) -> None:
    name = guest.machine.name
    written: list[dict[str, list[tuple[int, int]]]] = []
    with ckptmgr.connect(guest.machine.uri, store=tmp_path / "store") as host:
        domain = host.domain(name)
        for number in range(4):
            domain.create(f"c{number}")
            written.append(
                {
                    "vda": [(number * 3 * MIB, 4096), (40 * MIB + number * 8192, 16384)],
                    "vdb": [(number * MIB + GRANULARITY - 4096, 8192)] if number % 2 else [],
                }
            )
            for disk, ranges in written[number].items():
                for offset, length in ranges:
                    guest.shell.write(disk, offset, length, 0x41 + number)
        for start in range(4):
            for end in (*range(start + 1, 4), None):
                diff = domain.diff(f"c{start}", None if end is None else f"c{end}")
                for disk in diff.disks:
                    expected = [each for some in written[start:end] for each in some[disk.name]]
                    assert disk.known
                    assert disk.extents() == rounded(expected, GRANULARITY, SIZE)


@pytest.mark.thorough
def test_checkpoints_during_writes_miss_none_and_cut_between_two(
    guest: Guest, tmp_path: Path
) -> None:
    """A guest that writes granule after granule without a pause, and five checkpoints meanwhile.

    Each interval is then a range of granules.  A write that was on the disk before a create began
    is before the cut, one that began after it returned is behind; neighbours share one granule at
    most (the write that was under way) and leave none out.
    """
    cuts: list[tuple[int, int]] = []
    with ckptmgr.connect(guest.machine.uri, store=tmp_path / "store") as host:
        domain = host.domain(guest.machine.name)
        domain.create("c0")
        # more than it gets to, however late we look
        guest.shell.churn("vda", GRANULARITY, SIZE // GRANULARITY)
        for number in range(1, 6):
            guest.shell.wait_churned((cuts[-1][1] if cuts else 0) + 12)
            before = guest.shell.churned[-1]
            domain.create(f"c{number}")
            guest.shell.hear()
            cuts.append((before, guest.shell.churned[-1] + 1))
        guest.shell.wait_churned(guest.shell.churned[-1] + 5)
        guest.shell.stop_churn()
        last = guest.shell.churned[-1]
        intervals = [domain.diff(f"c{number}", f"c{number + 1}") for number in range(5)]
        intervals.append(domain.diff("c5"))

    ranges: list[tuple[int, int]] = []
    for diff in intervals:
        (vda,) = (disk for disk in diff.disks if disk.name == "vda")
        assert vda.known
        ((start, length),) = vda.extents()
        ranges.append((start // GRANULARITY, (start + length) // GRANULARITY - 1))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == last
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert start in (end, end + 1)
    for (before, after), (_, end) in zip(cuts, ranges, strict=False):
        assert before <= end <= after + 1
