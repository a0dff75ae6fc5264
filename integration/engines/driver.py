"""Runs plans on a machine as the use cases do, and says what its disks' intervals must be."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ckptmgr.dirtymap import DirtyMap
from ckptmgr.document import format_libvirt, format_request
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.disk import DiskLayers
from ckptmgr.engine.base import Engine, Outcome
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.engine.monitor import MonitorEngine
from ckptmgr.engine.offline import OfflineEngine
from ckptmgr.plan import planner
from ckptmgr.plan.request import (
    CreateDisk,
    CreateRequest,
    DeleteDisk,
    DeleteRequest,
    ReadDisk,
    ReadRequest,
    UndoRequest,
)
from ckptmgr.plan.steps import Plan, Step
from integration.stand import DiskSpec, Machine, await_greeting, rounded

LIBVIRT, MONITOR, OFFLINE = EngineName.LIBVIRT, EngineName.MONITOR, EngineName.OFFLINE
ENGINES = {LIBVIRT: LibvirtEngine, MONITOR: MonitorEngine, OFFLINE: OfflineEngine}

DISKS = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2", "raw"), cluster_size=4096),
    DiskSpec("vdc", format="raw"),
)
GRANULARITY = {"vda": 65536, "vdb": 4096, "vdc": 65536}


class Driver:
    """Makes plans from what the adapter finds, as the use cases do, and runs them."""

    def __init__(self, machine: Machine, engine: EngineName) -> None:
        self.machine = machine
        self.adapter: DomainAdapter = DomainAdapter.find(machine.stand.connection, machine.name)
        self.name = engine
        self.planner = planner(engine)
        self.engine: Engine = ENGINES[engine](self.adapter)
        self.targets = [
            disk.target for disk in machine.disks if disk.format == "qcow2" or engine is MONITOR
        ]
        self.scratch = machine.folder

    @property
    def socket(self) -> str | None:
        if self.name is OFFLINE:
            return None
        return str(self.adapter.runtime_directory() / "ckptmgr.sock")

    def layers(self) -> dict[str, DiskLayers]:
        return {found.target: found for found in self.adapter.layers()}

    def checkpoint(self, name: str) -> Checkpoint:
        disks = tuple(
            CheckpointDisk(
                disk.target,
                bitmap=name if disk.target in self.targets else None,
                persistent=disk.format == "qcow2",
                state=State.RECORDING if disk.target in self.targets else State.NONE,
            )
            for disk in self.machine.disks
        )
        return Checkpoint(name, int(time.time()), None, self.name, disks)

    def create_request(
        self, name: str, since: str | None = None, *, tell: bool = False
    ) -> CreateRequest:
        layers = {} if self.name is LIBVIRT else self.layers()
        checkpoint = self.checkpoint(name)
        shown = [
            (disk.name, "bitmap" if disk.bitmap and disk.persistent else "no")
            for disk in checkpoint.disks
        ]
        return CreateRequest(
            name,
            format_request(name, None, shown),
            format_libvirt(checkpoint),
            tuple(
                CreateDisk(
                    disk.target,
                    persistent=disk.format == "qcow2",
                    since=since,
                    since_granularity=GRANULARITY.get(disk.target),
                    layers=layers.get(disk.target),
                    scratch=str(self.scratch / f"{disk.target}.scratch"),
                )
                for disk in self.machine.disks
                if disk.target in self.targets
            ),
            self.socket,
            tell_libvirt=tell,
        )

    def create_plan(self, name: str, since: str | None = None, *, tell: bool = False) -> Plan:
        return self.planner.create(self.create_request(name, since, tell=tell))

    def create(self, name: str, since: str | None = None, *, tell: bool = False) -> Outcome:
        return self.engine.run(self.create_plan(name, since, tell=tell).steps)

    def delete_plan(self, name: str, *, missing: tuple[str, ...] = ()) -> Plan:
        layers = {} if self.name is LIBVIRT else self.layers()
        known = name in self.known()
        return self.planner.delete(
            DeleteRequest(
                name,
                tuple(
                    DeleteDisk(target, layers.get(target), target in missing)
                    for target in self.targets
                ),
                known_to_libvirt=known,
                redefinition=format_libvirt(self.checkpoint(name)),
            )
        )

    def read_plan(self, since: str) -> Plan:
        layers = {} if self.name is LIBVIRT else self.layers()
        return self.planner.read(
            ReadRequest(
                tuple(
                    ReadDisk(
                        target,
                        since,
                        GRANULARITY.get(target),
                        layers.get(target),
                        str(self.scratch / f"{target}.scratch"),
                    )
                    for target in self.targets
                ),
                self.socket,
            )
        )

    def read(self, since: str) -> Outcome:
        return self.engine.run(self.read_plan(since).steps)

    def known(self) -> set[str]:
        return {found.getName() for found in self.adapter.handle.listAllCheckpoints()}

    def bitmaps(self) -> set[tuple[str, str, str]]:
        """(disk, image, bitmap) of every layer, asked where they are."""
        return {
            (found.target, layer.image, bitmap.name)
            for found in self.layers().values()
            for layer in found.layers
            for bitmap in layer.bitmaps
        }

    def undo_later(self, name: str) -> tuple[Step, ...]:
        """As a later process would, which knows what was recorded and what it finds."""
        layers = () if self.name is LIBVIRT else tuple(self.layers().values())
        return self.planner.undo_create(
            UndoRequest(
                name,
                format_libvirt(self.checkpoint(name)),
                tuple(found for found in layers if found.target in self.targets),
                self.socket,
                told_libvirt=True,
            )
        )


class Writes:
    """The extents that each disk's writes since the last call mark."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.done: dict[str, int] = {}

    def since(self) -> dict[str, list[tuple[int, int]]]:
        marked = {}
        for target, writes in self.machine.writes.items():
            size = next(disk.size for disk in self.machine.disks if disk.target == target)
            new = writes[self.done.get(target, 0) :]
            self.done[target] = len(writes)
            marked[target] = rounded(new, GRANULARITY[target], size)
        return marked


def extents(maps: dict[str, DirtyMap]) -> dict[str, list[tuple[int, int]]]:
    return {target: list(found.extents()) for target, found in maps.items()}


def of(driver: Driver, marked: dict[str, list[tuple[int, int]]]) -> dict[str, Any]:
    return {target: marked[target] for target in driver.targets}


@contextmanager
def holding(image: Path) -> Iterator[None]:
    """Have another program read an image."""
    socket = Path(f"{image}.sock")
    process = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(socket), str(image)]
    )
    try:
        await_greeting(socket, process)
        yield
    finally:
        # a SIGTERM that comes while qemu-nbd starts is lost (QEMU 7.2)
        process.kill()
        process.wait()
