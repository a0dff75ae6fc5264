"""A long history costs a machine no more than a short one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.checkpoint import State
from integration.bench.bare import Bare
from integration.bench.history import GRANULE, WRITES, Grown, disk, in_turns, name
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, known, on_tops

COUNT = 30


@pytest.mark.thorough
def test_a_machine_carries_one_bitmap_however_many_checkpoints_it_has(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """Counts alone: `python -m integration.bench.history` has the times of a thousand."""
    machine, other = make_vm([disk(COUNT)]), make_vm([disk(COUNT)])
    with ckptmgr.connect(machine.uri, store=tmp_path / "store", engine="libvirt") as host:
        domain = host.domain(machine.name)
        plain = Grown(other, Bare(other.domain, tmp_path).create)
        in_turns(COUNT, (Grown(machine, domain.create, domain), plain), Grown.grow)

        newest = name(COUNT - 1)
        assert bitmaps(machine) == on_tops(machine, {"vda"}, newest)
        assert set(known(machine)) == {newest}
        assert len(bitmaps(other)) == COUNT

        views = domain.checkpoints(topological=True).checkpoints
        assert [view.name for view in views] == [name(number) for number in range(COUNT)]
        states = [view.disks[0].state for view in views]
        assert states == [State.ARCHIVED] * (COUNT - 1) + [State.RECORDING]
        assert len(list((tmp_path / "store").rglob("*.map"))) == COUNT - 1

        (found,) = domain.diff(name(0), newest).disks
        written = range(WRITES, COUNT * WRITES)  # what went before the first is not in it
        assert found.extents() == [(2 * GRANULE * write, GRANULE) for write in written]
