"""A disk that is full, or a store that turns read-only, at every single write of every operation.

Each system call of the store's writing is made to fail in turn, on a real machine: the operation
fails whole with a StoreFailed that says what to do, or is completed by the next command; nothing
is orphaned, `check` is clean after one ordinary command, and no difference is too small.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr
from ckptmgr.store import files
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, known, wipe
from integration.stand import MIB, Daemon, DiskSpec, Embedded, Machine

CALLS = ("_create", "_write", "_fsync", "_rename", "_unlink", "_mkdir", "_fsync_folder")
GRANULE = 65536
DISK = DiskSpec("vda", size=4 * MIB)
METADATA_ONLY = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY


@dataclass
class Fault:
    """Fails the call number `at` of the store's, and with `sticky` all after it."""

    error: int
    at: int
    sticky: bool
    calls: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(files, name, self._around(getattr(files, name)))

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.at or (self.sticky and self.calls > self.at):
                raise OSError(self.error, os.strerror(self.error))
            return call(*arguments)

        return called

    @property
    def struck(self) -> bool:
        return self.calls >= self.at


@dataclass
class World:
    """A machine, an empty store, and which granule was written when."""

    machine: Machine
    domain: ckptmgr.Domain
    cuts: list[str] = field(default_factory=list)

    def write(self) -> None:
        """The next granule: number n after the n-th checkpoint.

        It is not read back: a write that is lost is missing in the difference.
        """
        command = f"write -P 1 {len(self.cuts) * GRANULE} 512"
        if self.machine.active:
            self.machine.hmp(f'qemu-io -d {self.machine.device("vda")} "{command}"')
        else:
            image = self.machine.images["vda"]
            subprocess.run(["qemu-io", "-c", command, image], check=True, stdout=subprocess.DEVNULL)

    def create(self, name: str) -> None:
        self.domain.create(name)
        self.made(name)

    def made(self, name: str) -> None:
        """A checkpoint called `name` was made just now."""
        self.cuts.append(name)
        self.write()

    def names(self) -> list[str]:
        return [view.name for view in self.domain.checkpoints(topological=True).checkpoints]

    def codes(self) -> list[str]:
        return [each.code for each in self.domain.check() if not each.harmless]

    def check(self, *, all_known: bool) -> None:
        """Every difference has all that was written, and nothing else if it is known.

        From each checkpoint to the next, and from the first and the last until now.
        """
        listed = [name for name in self.cuts if name in self.names()]
        pairs: list[tuple[str, str | None]] = [*pairwise(listed), (listed[0], None)]
        for start, end in (*pairs, (listed[-1], None)):
            first = self.cuts.index(start) + 1
            last = len(self.cuts) + 1 if end is None else self.cuts.index(end) + 1
            (disk,) = self.domain.diff(start, end).disks
            assert disk.known or not all_known, f"{start}..{end}: {disk.reason}"
            if disk.known:
                expected = [(first * GRANULE, (last - first) * GRANULE)]
                assert disk.extents() == expected, f"{start}..{end}"


@dataclass(frozen=True)
class Operation:
    """One operation and what goes before it.

    exact -- nothing is unknown afterwards
    """

    run: Callable[[World], Any]
    before: Callable[[World], Any] = lambda world: None
    exact: bool = True
    engines: tuple[str, ...] = ("libvirt",)


def _metadata_gone(world: World) -> None:
    world.domain.delete("c2", metadata=True)


def _made_by_virsh(world: World) -> None:
    for name in ("v1", "v2"):
        world.machine.domain.checkpointCreateXML(
            f"<domaincheckpoint><name>{name}</name></domaincheckpoint>"
        )
        world.made(name)


def _bitmap_gone(world: World) -> None:
    if world.machine.active:
        node = world.machine.node("vda")
        world.machine.qmp("block-dirty-bitmap-remove", node=node, name="c1")
    else:
        command = ["qemu-img", "bitmap", "--remove", str(world.machine.images["vda"]), "c1"]
        subprocess.run(command, check=True)
    world.machine.domain.checkpointLookupByName("c0").delete(METADATA_ONLY)


DOCUMENT = (
    "<domaincheckpoint><name>c2</name><creationTime>1</creationTime>"
    "<parent><name>c1</name></parent>"
    "<disks><disk name='vda' bitmap='c2'/></disks>"
    "</domaincheckpoint>"
)

BOTH = ("libvirt", "offline")
OPERATIONS = {
    "create": Operation(lambda world: world.domain.create("c3"), engines=BOTH),
    "delete": Operation(lambda world: world.domain.delete("c1"), engines=BOTH),
    "delete-current": Operation(lambda world: world.domain.delete("c2")),
    "delete-all": Operation(lambda world: world.domain.delete("c0", children=True)),
    "delete-metadata": Operation(
        lambda world: world.domain.delete("c1", metadata=True), exact=True
    ),
    "archive": Operation(lambda world: world.domain.archive()),
    "redefine": Operation(
        lambda world: world.domain.redefine(DOCUMENT), before=_metadata_gone, exact=False
    ),
    "adopt": Operation(
        lambda world: world.domain.adopt(),
        before=_made_by_virsh,
        exact=False,
    ),
    "repair": Operation(lambda world: world.domain.repair(), before=_bitmap_gone),
}
CASES = [(engine, name) for name, each in OPERATIONS.items() for engine in each.engines]
FAULTS = {"disk-full": (errno.ENOSPC, False), "read-only": (errno.EROFS, True)}


NAMES = ("c0", "c1", "c2")


class Prepared:
    """A machine that has c0, c1 and c2 as often as one likes, and a store each time.

    They are made once; after that, what was there then is put back.
    """

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._store = folder / "store"
        self._image = folder / "image"
        with world_of(machine, self._store) as world:
            for name in NAMES:
                world.create(name)
            self._marker = world.domain.adapter.marker()
            self._documents = [
                machine.domain.checkpointLookupByName(name).getXMLDesc() for name in NAMES
            ]
            if not machine.active:
                shutil.copyfile(machine.images["vda"], self._image)

    @contextmanager
    def world(self, store: Path) -> Iterator[World]:
        """The machine with its checkpoints and with a store that is not there yet."""
        shutil.copytree(self._store, store)
        with world_of(self.machine, store) as world:
            if self.machine.active:
                node = self.machine.node("vda")
                for name in NAMES:
                    add = {"node": node, "name": name, "persistent": True}
                    self.machine.qmp("block-dirty-bitmap-add", **add)
                    world.made(name)
            else:
                shutil.copyfile(self._image, self.machine.images["vda"])
                world.cuts += NAMES
            for document in self._documents:
                flag = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
                self.machine.domain.checkpointCreateXML(document, flag)
            world.domain.adapter.set_marker(self._marker)
            yield world


@contextmanager
def world_of(machine: Machine, store: Path) -> Iterator[World]:
    """The machine as it is, and without checkpoints in the end."""
    with ckptmgr.connect(machine.uri, store=store) as host:
        try:
            yield World(machine, host.domain(machine.name))
        finally:
            wipe(machine)


@pytest.fixture(scope="module")
def prepared(
    embedded: Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Prepared]]:
    states = {"libvirt": "paused", "offline": "stopped"}
    machines = {engine: Machine(embedded, (DISK,), state=state) for engine, state in states.items()}
    yield {
        engine: Prepared(machine, tmp_path_factory.mktemp(engine))
        for engine, machine in machines.items()
    }
    for machine in machines.values():
        machine.destroy()


@pytest.mark.thorough
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("engine", "name"), CASES)
def test_at_every_write(
    engine: str,
    name: str,
    fault: str,
    prepared: dict[str, Prepared],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operation = OPERATIONS[name]
    error, sticky = FAULTS[fault]
    # What a pass without a fault leads to.
    with prepared[engine].world(tmp_path / "dry") as world:
        operation.before(world)
        before = world.names()
        operation.run(world)
        after = world.names()
    tried = 0
    for at in count(1):
        with prepared[engine].world(tmp_path / str(at)) as world:
            operation.before(world)
            there, listed = bitmaps(world.machine), known(world.machine)
            injected = Fault(error, at, sticky)
            failure: ckptmgr.StoreFailed | None = None
            with monkeypatch.context() as patch:
                injected.install(patch)
                try:
                    operation.run(world)
                except ckptmgr.StoreFailed as caught:
                    failure = caught
            if not injected.struck:
                break
            tried += 1
            where = f"{name} on {engine}, {fault} at call {at}"
            if failure is not None:
                assert "Errno" not in failure.message
                assert failure.hint
            intent = tmp_path / str(at) / world.machine.domain.UUIDString() / "intent.json"
            if failure is not None and not intent.exists() and name != "repair":
                # It failed whole.
                assert world.names() == before, where
                assert bitmaps(world.machine) == there, where
                assert known(world.machine) == listed, where
            if failure is None:
                assert world.names() == after, where
            # One ordinary command, and everything fits.
            if name == "create" and "c3" in world.names():
                world.made("c3")  # or it will be taken for one that was never made
            assert set(world.names()) <= {*before, *after}, where
            world.create("next")
            expected = [{"libvirt-only"}, set()] if name == "adopt" else [set()]
            if name in ("repair", "delete-metadata", "redefine"):
                # What is there to be cured stays until it is.
                world.domain.repair(foreign=True)
            assert set(world.codes()) in expected, where
            assert set(world.names()) - {"next"} in (set(before), set(after)) or sticky, where
            world.check(all_known=operation.exact)
    print(f"{name} on {engine}, {fault}: {tried} calls")
    assert tried >= 5


@pytest.fixture
def small(daemon: Daemon, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for little, in the stand's mount namespace."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no file system can be mounted here: {done.stderr.strip()}"
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_fills_up(daemon: Daemon, make_vm_on: MakeMachine, small: Path) -> None:
    """Every amount of free space, down to none: a page less each time."""
    machine = make_vm_on(daemon, (DISK,))
    filler = small / "filler"
    with ckptmgr.connect(machine.uri, store=small / "store") as host:
        world = World(machine, host.domain(machine.name))
        try:
            world.create("c0")
            failed = made = 0
            for free in range(0, 80 * 1024, 4096):
                filler.unlink(missing_ok=True)
                left = os.statvfs(small)
                filler.write_bytes(b"\0" * max(0, left.f_bavail * left.f_bsize - free))
                name = f"f{free // 4096}"
                there = bitmaps(machine)
                try:
                    world.create(name)
                    made += 1
                except ckptmgr.StoreFailed as error:
                    failed += 1
                    assert "No space left on device" in error.message
                    assert "free some space" in str(error.hint)
                    assert name not in world.names()
                    assert bitmaps(machine) == there
                filler.unlink()
                assert world.codes() == []
                if len(world.names()) > 3:
                    world.domain.archive()
                    world.domain.delete(world.names()[1])
            assert failed >= 3
            assert made >= 3
            world.create("last")
            world.check(all_known=True)
            assert world.codes() == []
        finally:
            wipe(machine)


def test_a_store_that_is_read_only_can_be_read(
    daemon: Daemon, make_vm_on: MakeMachine, small: Path
) -> None:
    machine = make_vm_on(daemon, (DISK,), state="stopped")
    with ckptmgr.connect(machine.uri, store=small / "store") as host:
        world = World(machine, host.domain(machine.name))
        world.create("c0")
        world.create("c1")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        try:
            assert world.names() == ["c0", "c1"]
            assert world.domain.check() == ()
            (vda,) = world.domain.diff("c0", "c1").disks
            assert vda.extents() == [(GRANULE, GRANULE)]
            there = bitmaps(machine)
            for change in (
                lambda: world.domain.create("c2"),
                lambda: world.domain.delete("c0"),
                lambda: world.domain.archive(),
                lambda: world.domain.repair(),
            ):
                with pytest.raises(ckptmgr.StoreFailed, match="Read-only file system"):
                    change()
            assert bitmaps(machine) == there
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        world.check(all_known=True)
        wipe(machine)
