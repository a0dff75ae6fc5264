"""Restore points on every stack, with each engine that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.evidence import domain_of
from integration.stacks import Stack
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Stand
from integration.test_backup import Backups

LOST = {"missing-bitmap", "inconsistent-bitmap"}
"""What a crash costs."""


class OnStack(Backups):
    """`Backups` of a machine of a stack."""

    sockets: Path | None

    @contextmanager
    def domain(self) -> Iterator[ckptmgr.Domain]:
        yield domain_of(
            self.machine,
            self.store,
            self.engine,
            socket_directory=self.sockets,  # type: ignore[arg-type]
        )


@pytest.mark.scenario("restore points: full, incremental, stopped, after a crash")
def test_every_point_holds_what_the_disks_held(
    stand: Stand, make_vm_on: MakeMachine, cell: Cell
) -> None:
    disks = [
        DiskSpec("vda", size=4 * MIB, backing=("qcow2",)),
        DiskSpec("vdb", size=3 * MIB + 512, cluster_size=4096),
        DiskSpec("vdc", size=2 * MIB, format="raw"),
    ]
    machine = make_vm_on(stand, disks, state="running")
    vm = OnStack(machine, stand.workspace.folder("b"))
    vm.sockets = stand.sockets if isinstance(stand, Stack) else None
    made = []
    engines = ["auto", "monitor", "auto"]
    for number, engine in enumerate(engines, 1):
        vm.engine = engine
        vm.scatter(number)
        made.append(vm.take(f"p{number}"))
    assert [disk.mode for disk in made[0].disks] == ["full"] * 3
    for point in made[1:]:
        assert [disk.mode for disk in point.disks] == ["incremental"] * 3
        assert [disk.reason for disk in point.disks[:2]] == [None, None]
    vm.engine = "auto"
    machine.stop()
    made.append(vm.take("stopped", held=vm.contents()))
    machine.start(paused=False)
    vm.scatter(9)
    made.append(vm.take("started"))
    assert [disk.reason for disk in made[-1].disks[:2]] == [None, None]
    machine.kill()
    machine.start(paused=False)
    made.append(vm.take("crashed"))
    vm.check(*made)
    with vm.domain() as domain:
        assert {each.code for each in domain.check() if not each.harmless} <= LOST
