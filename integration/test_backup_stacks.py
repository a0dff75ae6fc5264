"""Restore points on every stack, with each engine that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from ckptmgr.checkpoint import EngineName
from integration.conftest import MakeMachine
from integration.evidence import domain_of
from integration.stacks import Stack
from integration.stacks.fixtures import Stacks
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Stand
from integration.test_backup import Backups
from integration.test_backup_faults import clean, quiet, sound, whole
from integration.test_stacks_moves import live_migration

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


@pytest.mark.scenario("a live migration in the middle of a backup that libvirt knows nothing of")
@pytest.mark.parametrize(("source", "target"), [("debian12", "debian13"), ("debian11", "debian12")])
def test_a_domain_that_is_migrated_in_the_middle_loses_no_interval(
    source: str, target: str, stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    """QEMU 7.2 gives the migration up, and the backup is whole; 5.2 moves, and the backup fails."""
    cell.of(stack=f"{source} to {target}", engine=EngineName.MONITOR)
    here, there = stacks(source), stacks(target)
    disks = [DiskSpec("vda", size=24 * MIB), DiskSpec("vdb", size=2 * MIB)]
    machine = make_vm_on(here, disks, state="running")
    vm = OnStack(machine, here.workspace.folder("b"))
    vm.sockets, vm.engine = here.sockets, "monitor"
    vm.scatter(1)
    first = vm.take("first")
    machine.write("vda", 0, 20 * MIB, 0x31)
    vm.scatter(2)
    moved: list[object] = []

    def act(disk: str, done: int, total: int) -> None:
        if done and not moved:
            try:
                live_migration(machine, there)
                moved.append(True)
            except libvirt.libvirtError as error:
                moved.append(error)

    held = vm.contents()
    failure = None
    try:
        points = [first, vm.take("second", held=held, progress=act)]
    except ckptmgr.OperationFailed as error:
        points, failure = [first], error
    (said,) = moved
    assert (failure is None) == (said is not True), (failure, said)
    if failure is not None:
        assert "reading disk vda over NBD failed" in failure.message
        assert "another host" in str(failure.hint)
        machine.stand = there
        machine.domain = there.handle.lookupByName(machine.name)
        there.workspace.record(machine.pid)
        vm.sockets = there.sockets
    assert machine.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert vm.contents() == held
    vm.scatter(3)
    points.append(vm.take("third"))
    assert [(disk.mode, disk.reason) for disk in points[-1].disks] == [("incremental", None)] * 2
    vm.check(*points)
    whole(vm.repository, *(point.name for point in points))
    sound(vm.repository)
    quiet(machine)
    nodes = {node["node-name"] for node in machine.qmp("query-named-block-nodes")}
    assert not any("ckptmgr" in name for name in nodes)
    left = [path for each in (here, there) for path in each.sockets.rglob("*ckptmgr*")]
    assert left == []
    with vm.domain() as domain:
        # That libvirt has not heard of the first one's checkpoint, as after any migration.
        assert {each.code for each in domain.repair()} <= {"store-only", "wrong-parent"}
    clean(vm)
