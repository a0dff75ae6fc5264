"""The three engines on real machines: what they read is what was written, and they clean up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libvirt
import nbd
import pytest

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ckptmgr.dirtymap import DirtyMap
from ckptmgr.document import format_libvirt, format_request
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.disk import DiskLayers
from ckptmgr.engine.base import Engine, Outcome
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.engine.monitor import MonitorEngine, listening
from ckptmgr.engine.offline import OfflineEngine
from ckptmgr.engine.qemu_img import check_free, image_name, serve
from ckptmgr.errors import BitmapBroken, Busy, CheckpointExists, Unsupported
from ckptmgr.nbd import read_dirty_map
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
from ckptmgr.plan.steps import CheckpointRedefine, Export, ImageBitmap, Plan, Step
from integration.conftest import MakeMachine
from integration.stand import MIB, Daemon, DiskSpec, Machine, Stand, await_greeting, rounded

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


@pytest.fixture(params=list(ENGINES), ids=[str(engine) for engine in ENGINES])
def driver(
    request: pytest.FixtureRequest, stand: Stand, make_vm_on: MakeMachine
) -> Iterator[Driver]:
    engine: EngineName = request.param
    machine = make_vm_on(stand, DISKS, state="stopped" if engine is OFFLINE else "paused")
    return Driver(machine, engine)


@pytest.fixture(params=[LIBVIRT, MONITOR], ids=["libvirt", "monitor"])
def running(
    request: pytest.FixtureRequest, stand: Stand, make_vm_on: MakeMachine
) -> Iterator[Driver]:
    return Driver(make_vm_on(stand, DISKS), request.param)


# --- what is read ----------------------------------------------------------------------------


def test_every_interval_is_what_was_written_in_it(driver: Driver) -> None:
    machine, writes = driver.machine, Writes(driver.machine)
    for target in GRANULARITY:
        machine.write(target, 0, MIB)  # before the first checkpoint: in no interval
    writes.since()
    assert driver.create("c0").maps == {}
    previous = "c0"
    for number in range(1, 4):
        for at, target in enumerate(GRANULARITY):
            machine.write(target, (number * 10 + at) * MIB + 512, 1024)
            machine.write(target, 64 * MIB - number * 512, 512)
        closed = driver.create(f"c{number}", previous)
        marked = writes.since()
        assert extents(closed.maps) == of(driver, marked)
        previous = f"c{number}"
    machine.write("vda", 5 * MIB, 1)
    machine.write("vdb", 7 * MIB, 8192)
    marked = of(driver, writes.since())
    assert extents(driver.read("c3").maps) == marked
    assert extents(driver.read("c3").maps) == marked  # reading changes nothing


def test_a_clean_interval_is_known_to_be_clean(driver: Driver) -> None:
    driver.create("c0")
    maps = driver.create("c1", "c0").maps
    assert set(maps) == set(driver.targets)
    assert all(found.is_empty for found in maps.values())


def test_nothing_but_the_checkpoints_bitmaps_is_left(driver: Driver) -> None:
    driver.create("c0")
    driver.create("c1", "c0")
    driver.read("c1")
    assert {(disk, name) for disk, _, name in driver.bitmaps()} == {
        (target, name) for target in driver.targets for name in ("c0", "c1")
    }
    socket = driver.socket
    assert socket is None or not Path(socket).exists()
    assert not list(driver.scratch.glob("*.scratch"))


def test_bitmaps_are_what_libvirts_own_are(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    driver = Driver(machine, MONITOR)
    Driver(machine, LIBVIRT).create("own")
    driver.create("ours")
    own, ours = (machine.bitmaps("vda")[name] for name in ("own", "ours"))
    assert {**own, "name": None} == {**ours, "name": None}


@pytest.mark.parametrize("engine", [MONITOR, OFFLINE])
def test_libvirt_takes_over_what_the_other_engines_made(
    engine: EngineName, stand: Stand, make_vm_on: MakeMachine
) -> None:
    disks = DISKS[:2]
    machine = make_vm_on(stand, disks, state="stopped" if engine is OFFLINE else "paused")
    Driver(machine, engine).create("c0", tell=True)
    if engine is OFFLINE:
        machine.start()
    driver = Driver(machine, LIBVIRT)
    document = format_libvirt(driver.checkpoint("c0"))
    driver.engine.run([CheckpointRedefine("c0", document, validate=True)])
    machine.write("vda", 3 * MIB, MIB)
    assert extents(driver.create("c1", "c0").maps) == {"vda": [(3 * MIB, MIB)], "vdb": []}


def test_an_interval_is_whole_across_an_external_snapshot(running: Driver) -> None:
    machine, writes = running.machine, Writes(running.machine)
    if running.name is MONITOR:
        running.targets.remove("vdc")  # libvirt's snapshots keep persistent bitmaps alone
    running.create("c0")
    machine.write("vda", 1 * MIB, MIB)
    snapshot(machine, "vda")
    machine.write("vda", 9 * MIB, MIB)
    machine.write("vdb", 9 * MIB, MIB)
    assert extents(running.create("c1", "c0").maps) == of(running, writes.since())


def snapshot(machine: Machine, *targets: str) -> None:
    """An external snapshot of some disks, as `virsh snapshot-create-as --disk-only` makes it."""
    disks = "".join(
        f"<disk name='{disk.target}' snapshot='external'>"
        f"<source file='{machine.folder}/{disk.target}.overlay'/></disk>"
        if disk.target in targets
        else f"<disk name='{disk.target}' snapshot='no'/>"
        for disk in machine.disks
    )
    machine.domain.snapshotCreateXML(
        f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    for target in targets:
        machine.images[target] = Path(f"{machine.folder}/{target}.overlay")


def test_more_extents_than_one_reply_can_hold(tmp_path: Path) -> None:
    image, granule, count = tmp_path / "many.qcow2", 512, 70_000
    size = 2 * granule * count
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "512", image, "b"], check=True)
    socket = tmp_path / "s"
    server = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "--cache=unsafe", "-k", socket, image])
    while not socket.exists():
        time.sleep(0.01)
    handle = nbd.NBD()
    handle.connect_unix(str(socket))
    data = nbd.Buffer.from_bytearray(b"x" * granule)
    for number in range(count):
        handle.aio_pwrite(data, 2 * number * granule)
        while handle.aio_in_flight() > 64:
            handle.poll(-1)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()
    assert server.wait(20) == 0
    with serve("vda", str(image), "b") as served:
        found = read_dirty_map(served.socket, Export("vda", "", "b", granule))
    assert list(found.extents()) == [(2 * n * granule, granule) for n in range(count)]


# --- delete ----------------------------------------------------------------------------------


def test_a_deleted_checkpoint_leaves_the_others_alone(driver: Driver) -> None:
    driver.create("c0")
    driver.create("c1", "c0")
    driver.create("c2", "c1")
    driver.engine.run(driver.delete_plan("c1").steps)
    assert {name for _, _, name in driver.bitmaps()} == {"c0", "c2"}
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.read("c2").maps)["vda"] == [(MIB, MIB)]


def test_delete_reaches_through_the_backing_chain(running: Driver) -> None:
    machine = running.machine
    if running.name is MONITOR:
        running.targets.remove("vdc")
    running.create("c0")
    running.create("c1", "c0")
    snapshot(machine, "vda", "vdb")
    before = nodes(machine)
    assert len([entry for entry in running.bitmaps() if entry[2] == "c0"]) == 4
    running.engine.run(running.delete_plan("c0").steps)
    assert {name for _, _, name in running.bitmaps()} == {"c1"}
    assert nodes(machine) == before  # read-only nodes are read-only again, caches as they were
    machine.write("vda", MIB, MIB)
    assert extents(running.read("c1").maps)["vda"] == [(MIB, MIB)]


def nodes(machine: Machine) -> dict[str, tuple[Any, ...]]:
    return {
        node["node-name"]: (node["ro"], node["cache"], node["detect_zeroes"])
        for node in machine.qmp("query-named-block-nodes", flat=True)
    }


def test_an_offline_delete_reaches_through_the_backing_chain(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:2])
    Driver(machine, MONITOR).create("c0")
    snapshot(machine, "vda")
    machine.stop()
    driver = Driver(machine, OFFLINE)
    assert len([entry for entry in driver.bitmaps() if entry[0] == "vda"]) == 2
    driver.engine.run(driver.delete_plan("c0").steps)
    assert driver.bitmaps() == set()


def test_delete_after_a_lost_bitmap_names_the_disk_and_then_works_without_it(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:2])
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    with pytest.raises(BitmapBroken) as caught:
        driver.engine.run(driver.delete_plan("c0").steps)
    assert caught.value.disk == "vda"
    driver.engine.run(driver.delete_plan("c0", missing=("vda",)).steps)
    assert driver.bitmaps() == set()
    assert driver.known() == set()


def test_a_backing_image_that_others_use_is_not_touched(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    driver = Driver(machine, MONITOR)
    driver.create("c0")
    below = machine.images["vda"]
    snapshot(machine, "vda")
    before, bitmaps = nodes(machine), driver.bitmaps()
    with holding(below):
        with pytest.raises(Busy) as caught:
            driver.engine.run(driver.delete_plan("c0").steps)
        assert str(below) in caught.value.message
        assert "vda" in caught.value.message
        assert driver.bitmaps() == bitmaps
        assert nodes(machine) == before


class holding:  # noqa: N801 -- used like a function
    """Another program that reads an image."""

    def __init__(self, image: Path) -> None:
        self.command = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", f"{image}.sock", str(image)]
        self.socket = Path(f"{image}.sock")

    def __enter__(self) -> None:
        self.process = subprocess.Popen(self.command)
        await_greeting(self.socket, self.process)

    def __exit__(self, *_: object) -> None:
        # a SIGTERM that comes while qemu-nbd starts is lost (QEMU 7.2)
        self.process.kill()
        self.process.wait()


# --- refusals --------------------------------------------------------------------------------


def test_somebody_elses_backup_job_is_left_alone(running: Driver) -> None:
    machine = running.machine
    running.create("c0")
    socket, scratch = machine.folder / "theirs.sock", machine.folder / "theirs"
    machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
        "</disks></domainbackup>",
        None,
    )
    bitmaps = running.bitmaps()
    plan = running.create_plan("c1", "c0")
    start = time.monotonic()
    with pytest.raises(Busy):
        running.engine.run(plan.steps)
    assert time.monotonic() - start < 5  # libvirt itself would wait for 30 s
    running.engine.run(plan.undo)
    with pytest.raises(Busy):
        running.read("c0")
    running.engine.run(running.read_plan("c0").undo)
    assert running.bitmaps() == bitmaps
    assert running.known() == ({"c0"} if running.name is LIBVIRT else set())
    assert str(socket) in machine.domain.backupGetXMLDesc()
    machine.domain.abortJob()


def test_the_question_whether_a_server_runs_leaves_it_no_client(make_vm: MakeMachine) -> None:
    """QEMU stands still for ever when a server is stopped that has a client yet to negotiate."""
    machine = make_vm([DiskSpec("vda")])
    socket = machine.folder / "nbd"
    assert not listening(str(socket))
    server = {"type": "unix", "data": {"path": str(socket)}}
    machine.qmp("nbd-server-start", addr=server)
    with ThreadPoolExecutor(1) as pool:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            asked = pool.submit(listening, str(socket))
            time.sleep(0.5)
            told_too_early = asked.done()
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert asked.result()
    assert not told_too_early
    machine.qmp("nbd-server-stop")
    assert not listening(str(socket))


def test_a_bitmap_of_the_name_belongs_to_somebody_else_and_stays(running: Driver) -> None:
    running.create("c0")
    plan = running.create_plan("c1", "c0")
    machine = running.machine
    machine.qmp("block-dirty-bitmap-add", node=machine.node("vdb"), name="c1", persistent=True)
    before = running.bitmaps()
    with pytest.raises(CheckpointExists):
        running.engine.run(plan.steps)
    running.engine.run(plan.release)
    assert running.bitmaps() == before
    assert "c1" not in running.known()


def test_a_bitmap_that_vanished_is_broken_and_not_clean(running: Driver) -> None:
    running.create("c0")
    plan, machine = running.create_plan("c1", "c0"), running.machine
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    with pytest.raises(BitmapBroken):
        running.engine.run(plan.steps)
    running.engine.run(plan.undo)
    assert {name for _, _, name in running.bitmaps()} <= {"c0"}


def test_a_checkpoint_that_libvirt_does_not_know_is_broken_for_it(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    Driver(machine, MONITOR).create("c0")
    with pytest.raises(BitmapBroken) as caught:
        Driver(machine, LIBVIRT).create("c1", "c0")
    assert caught.value.disk == "vda"


def test_an_image_in_use_elsewhere_leaves_every_image_unchanged(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:2], state="stopped"), OFFLINE)
    driver.create("c0")
    before = {path: path.read_bytes() for path in driver.machine.images.values()}
    with holding(driver.machine.images["vdb"]), pytest.raises(Busy, match=r"vdb\.qcow2"):
        driver.create("c1", "c0")
    with holding(driver.machine.images["vdb"]), pytest.raises(Busy, match=r"vdb\.qcow2"):
        driver.engine.run(driver.delete_plan("c0").steps)
    assert {path: path.read_bytes() for path in driver.machine.images.values()} == before


def test_the_image_of_a_running_machine_is_in_use(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS[:1])
    image = str(machine.images["vda"])
    with pytest.raises(Busy):
        check_free("vda", image)
    with pytest.raises(Busy):
        OfflineEngine(DomainAdapter.find(stand.connection, machine.name)).run(
            [ImageBitmap("vda", image, "add", "c0")]
        )
    machine.stop()
    check_free("vda", image)


def test_reading_the_bitmap_of_an_image_in_use_is_refused(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:1], state="stopped"), OFFLINE)
    driver.create("c0")
    plan = driver.read_plan("c0")
    driver.machine.start()
    with pytest.raises(Busy):
        driver.engine.run(plan.steps)


def test_a_bitmap_that_is_not_offered_is_an_error(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "there"], check=True)
    export = Export("vda", "", "absent", 65536)
    with (
        serve("vda", str(image), "absent") as server,
        pytest.raises(BitmapBroken, match="absent"),
    ):
        read_dirty_map(server.socket, export, check=server.check)
    with serve("vda", str(image), "there") as server, pytest.raises(BitmapBroken, match="absent"):
        read_dirty_map(server.socket, export, check=server.check)


@pytest.mark.parametrize("name", ["a,b.qcow2", "nbd:x", '-f "q"', "a:b=c,d", "žluťoučký <&>"])
def test_offline_takes_any_file_name(name: str, stand: Stand, make_vm_on: MakeMachine) -> None:
    folder = stand.workspace.folder("n")
    image = folder / name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "x", "64M"], check=True, cwd=folder)
    (folder / "x").rename(image)
    driver = Driver(make_vm_on(stand, (DiskSpec("vda", image=image),), state="stopped"), OFFLINE)
    driver.create("-f")
    command = ["qemu-io", "-c", "write 1M 64k", image_name(str(image))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert extents(driver.create("--all", "-f").maps) == {"vda": [(MIB, 65536)]}
    driver.engine.run(driver.delete_plan("-f").steps)
    assert {bitmap for _, _, bitmap in driver.bitmaps()} == {"--all"}


def test_offline_without_qemu_img_says_what_to_install(
    stand: Stand, make_vm_on: MakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:1], state="stopped"), OFFLINE)
    plan = driver.create_plan("c0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="qemu-img") as caught:
        driver.engine.run(plan.steps)
    assert "qemu-utils" in str(caught.value.hint)


def test_the_libvirt_engine_does_not_use_the_monitor(stand: Stand, make_vm_on: MakeMachine) -> None:
    machine = make_vm_on(stand, DISKS)
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    driver.create("c1", "c0")
    driver.read("c1")
    driver.engine.run(driver.delete_plan("c0").steps)
    driver.engine.run(driver.create_plan("c2", "c1").undo)
    assert not [text for text in machine.domain.messages(0) if "monitor" in text]
    machine.qmp("query-status")
    assert [text for text in machine.domain.messages(0) if "monitor" in text]


# --- taking back -----------------------------------------------------------------------------


def test_a_create_that_stopped_after_any_step_can_be_taken_back(driver: Driver) -> None:
    tell = driver.name is not LIBVIRT
    driver.create("c0", tell=tell)
    before, known = driver.bitmaps(), driver.known()
    steps = driver.create_plan("c1", "c0", tell=tell).steps
    for done in range(len(steps) + 1):
        plan = driver.create_plan("c1", "c0", tell=tell)
        driver.engine.run(plan.steps[:done])
        # at once with the plan's own undo, or later with what is then found
        driver.engine.run(plan.undo if done % 2 else driver.undo_later("c1"))
        assert driver.bitmaps() == before, f"after {done} steps"
        assert driver.known() == known
        socket = driver.socket
        assert socket is None or not Path(socket).exists()
    driver.create("c1", "c0", tell=tell)  # nothing stands in the way of the next


def test_a_read_that_stopped_after_any_step_can_be_taken_back(running: Driver) -> None:
    running.create("c0")
    before = running.bitmaps()
    steps = running.read_plan("c0").steps
    for done in range(len(steps) + 1):
        plan = running.read_plan("c0")
        running.engine.run(plan.steps[:done])
        running.engine.run(plan.undo)
        assert running.bitmaps() == before, f"after {done} steps"
    assert not list(running.machine.qmp("query-block-exports"))


def test_a_create_left_behind_does_not_stop_the_next(stand: Stand, make_vm_on: MakeMachine) -> None:
    driver = Driver(make_vm_on(stand, DISKS), MONITOR)
    driver.create("c0")
    driver.engine.run(driver.read_plan("c0").steps[:3])  # killed while the server runs
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.create("c1", "c0").maps)["vda"] == [(MIB, MIB)]


def test_undo_removes_bitmaps_that_libvirt_has_no_metadata_of(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    """libvirt ended between the transaction and the writing of its file."""
    machine = make_vm_on(stand, DISKS[:2])
    driver = Driver(machine, LIBVIRT)
    driver.create("c0")
    machine.domain.checkpointLookupByName("c0").delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    )
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vda"), name="c0")
    assert driver.bitmaps()
    driver.engine.run(driver.undo_later("c0"))
    assert driver.bitmaps() == set()
    assert driver.known() == set()


def test_undo_does_not_change_what_libvirt_takes_for_current(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(stand, DISKS[:2]), LIBVIRT)
    driver.create("c0")
    driver.engine.run(driver.create_plan("c1", "c0").undo)
    driver.create("c1", "c0")
    driver.engine.run(driver.create_plan("c2", "c1").undo)
    driver.create("c2", "c1")
    parents = {
        found.getName(): found.getParent().getName()
        for found in driver.adapter.handle.listAllCheckpoints()
        if found.getName() != "c0"
    }
    assert parents == {"c1": "c0", "c2": "c1"}


def test_nothing_listens_on_after_its_reader_was_killed(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "b"], check=True)
    script = f"""
        import time
        from pathlib import Path
        from ckptmgr.engine.qemu_img import serve
        with serve("vda", {str(image)!r}, "b") as server:
            while not Path(server.socket).exists():
                server.check()
                time.sleep(0.01)
            print(server._process.pid, flush=True)
            time.sleep(60)
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert reader.stdout is not None
    pid = int(reader.stdout.readline())
    assert "qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_text()
    reader.kill()
    reader.wait()
    reader.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) or not is_free(image):  # other threads of it may end a little later
        assert time.monotonic() < deadline, "qemu-nbd goes on"
        time.sleep(0.02)


def is_free(image: Path) -> bool:
    try:
        check_free("vda", str(image))
    except Busy:
        return False
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_ctrl_c_waits_for_qemu_img(tmp_path: Path) -> None:
    """A qemu-img that is ended half way loses all bitmaps of its image."""
    image, tools = tmp_path / "a.qcow2", tmp_path / "bin"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    tools.mkdir()
    slow = tools / "qemu-img"
    slow.write_text(f'#!/bin/sh\ntouch {tmp_path}/began\nsleep 1\nPATH=$REAL exec qemu-img "$@"\n')
    slow.chmod(0o755)
    script = f"""
        from ckptmgr.engine.qemu_img import change_bitmap
        from ckptmgr.plan.steps import ImageBitmap
        change_bitmap(ImageBitmap("vda", {str(image)!r}, "add", "b"))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "REAL": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        start_new_session=True,
    )
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", image], check=True, capture_output=True
    )
    bitmaps = json.loads(info.stdout)["format-specific"]["data"]["bitmaps"]
    assert [(each["name"], each["flags"]) for each in bitmaps] == [("b", ["auto"])]


@pytest.mark.parametrize("engine", [LIBVIRT, MONITOR])
def test_a_create_killed_at_any_instant_can_be_taken_back(
    engine: EngineName, daemon: Daemon, make_vm_on: MakeMachine
) -> None:
    driver = Driver(make_vm_on(daemon, DISKS), engine)
    driver.create("c0")
    before, known = driver.bitmaps(), driver.known()
    script = f"""
        import sys
        from integration.test_engines import DISKS, Driver, EngineName
        from ckptmgr.domain.connection import connect
        class Stand: pass
        class Machine: pass
        machine, stand = Machine(), Stand()
        stand.connection = connect({daemon.uri!r})
        machine.stand, machine.name, machine.disks = stand, {driver.machine.name!r}, DISKS
        from pathlib import Path
        machine.folder = Path({str(driver.machine.folder)!r})
        driver = Driver(machine, EngineName({engine.value!r}))
        plan = driver.create_plan("c1", "c0")
        print("ready", flush=True)
        driver.engine.run(plan.steps)
        sys.stdin.read()
    """
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **daemon.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        driver.engine.run(driver.undo_later("c1"))
        assert driver.bitmaps() == before, f"killed after {delay} s"
        assert driver.known() == known
    driver.machine.write("vda", MIB, MIB)
    assert extents(driver.create("c1", "c0").maps)["vda"] == [(MIB, MIB)]
