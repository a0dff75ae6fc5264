"""Killed in the middle: whatever was under way, the next command on the domain settles it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.engine.monitor import MonitorEngine
from ckptmgr.engine.offline import OfflineEngine
from ckptmgr.errors import ConnectionFailed
from integration.evidence import Timeline, bitmaps, domain_of, files, known, on_tops, wipe
from integration.stand import MIB, Daemon, DiskSpec, Machine

DISKS = (DiskSpec("vda", size=4 * MIB), DiskSpec("vdb", size=4 * MIB, cluster_size=4096))
TRACKED = {"vda", "vdb"}

PROGRAM = """
import os, signal, sys
import ckptmgr
from ckptmgr.engine import libvirt, monitor, offline
from ckptmgr.store.domain import DomainStore

uri, store, domain, engine, point, command, *arguments = sys.argv[1:]

def die_after(owner, name, label):
    original = getattr(owner, name)
    def wrapped(self, *given, **options):
        result = original(self, *given, **options)
        if (label or type(given[0]).__name__) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

for owner in (libvirt.LibvirtEngine, monitor.MonitorEngine, offline.OfflineEngine):
    die_after(owner, "perform", None)
for name in ("write_intent", "save_checkpoint", "save_record"):
    die_after(DomainStore, name, name)
with ckptmgr.connect(uri, store=store, engine=engine) as host:
    getattr(host.domain(domain), command)(*arguments)
"""

CREATE = {
    "libvirt": ("write_intent", "BackupBegin", "ReadMaps", "save_checkpoint", "save_record"),
    "monitor": ("Transaction", "NbdExport", "BitmapsRemove"),
    "offline": ("ImageBitmap", "CheckpointRedefine"),
}
DELETE = {
    "libvirt": ("write_intent", "CheckpointDelete", "save_checkpoint"),
    "monitor": ("BitmapsRemove",),
    "offline": ("ImageBitmap",),
}
DIFF = {"libvirt": ("BackupBegin",), "monitor": ("NbdStart", "Transaction")}


def kill_at(
    point: str, engine: str, machine: Machine, store: Path, command: str, *arguments: str
) -> None:
    """Run a command in a process that is killed (SIGKILL) right after `point`."""
    words = [machine.uri, str(store), machine.name, engine, point, command, *arguments]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, f"{point} was not reached: {done.stderr}"


class Scene:
    """A machine with the checkpoints c0 and c1, and writes after each."""

    def __init__(self, machine: Machine, store: Path, engine: str) -> None:
        self.machine = machine
        self.store = store
        self.domain = domain_of(machine, store, engine)
        self.timeline = Timeline(machine)
        for name in ("c0", "c1"):
            self.domain.create(name)
            self.timeline.cut(name)
            self.timeline.scatter()

    def names(self) -> list[str]:
        return [view.name for view in self.domain.checkpoints(topological=True).checkpoints]

    def settled(self) -> list[str]:
        """Any command settles it; then QEMU, libvirt and the store agree.  What is left."""
        self.domain.diff("c0")
        names = self.names()
        assert bitmaps(self.machine) == on_tops(self.machine, TRACKED, *names)
        assert known(self.machine) == dict(zip(names, (None, *names), strict=False))
        assert self.domain.checkpoints().current == names[-1]
        assert not any("intent" in path or ".tmp" in path for path in files(self.store))
        if self.machine.active:
            assert self.machine.domain.jobInfo()[0] == 0
            assert self.machine.qmp("query-block-exports") == []
            folder = self.domain.adapter.runtime_directory()
            assert [path for path in folder.iterdir() if path.name.startswith("ckptmgr")] == []
        return names

    def check(self, *names: str) -> None:
        self.timeline.check_all(self.domain, names, TRACKED)


@pytest.fixture(scope="module")
def shared(daemon: Daemon) -> Iterator[Machine]:
    machine = Machine(daemon, DISKS)
    yield machine
    machine.destroy()


@pytest.fixture
def machine(shared: Machine, daemon: Daemon) -> Iterator[Machine]:
    yield shared
    if not daemon.handle.isAlive():  # a test failed half way
        start_again(daemon, shared)
    wipe(shared)


def start_again(daemon: Daemon, machine: Machine) -> None:
    daemon.start()
    machine.domain = daemon.handle.lookupByName(machine.name)


def _each(points: dict[str, tuple[str, ...]]) -> list[Any]:
    # all of one engine together, so that the machine is stopped once
    return [
        pytest.param(engine, point, id=f"{engine}-{point}")
        for engine in points
        for point in points[engine]
    ]


def _as_needed(machine: Machine, engine: str) -> None:
    if machine.active and engine == "offline":
        machine.stop()
    if not machine.active and engine != "offline":
        machine.start()


@pytest.mark.parametrize(("engine", "point"), _each(CREATE))
def test_a_create_that_was_killed(
    engine: str, point: str, machine: Machine, tmp_path: Path
) -> None:
    _as_needed(machine, engine)
    scene = Scene(machine, tmp_path, engine)
    kill_at(point, engine, machine, tmp_path, "create", "c2")
    there = "c2" in scene.names()  # its document is the moment at which it exists
    assert there is (point in ("save_checkpoint", "save_record"))
    if there:
        scene.timeline.cut("c2")
    scene.timeline.scatter()
    assert scene.settled() == (["c0", "c1", "c2"] if there else ["c0", "c1"])
    scene.check("c0", "c1", *(["c2"] if there else []))
    scene.domain.create("c3")  # and it goes on
    scene.timeline.cut("c3")
    scene.timeline.check(scene.domain, "c1", "c3", TRACKED)


@pytest.mark.parametrize(("engine", "point"), _each(DELETE))
def test_a_delete_that_was_killed(
    engine: str, point: str, machine: Machine, tmp_path: Path
) -> None:
    _as_needed(machine, engine)
    scene = Scene(machine, tmp_path, engine)
    scene.domain.create("c2")
    scene.timeline.cut("c2")
    scene.timeline.scatter()
    kill_at(point, engine, machine, tmp_path, "delete", "c1")
    assert scene.settled() == ["c0", "c2"]
    scene.check("c0", "c2")


@pytest.mark.parametrize(("engine", "point"), _each(DIFF))
def test_a_diff_that_was_killed(engine: str, point: str, machine: Machine, tmp_path: Path) -> None:
    _as_needed(machine, engine)
    scene = Scene(machine, tmp_path, engine)
    kill_at(point, engine, machine, tmp_path, "diff", "c0")
    assert scene.settled() == ["c0", "c1"]
    scene.check("c0", "c1")


# --- libvirt goes away -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "point"),
    [
        ("libvirt", "BackupBegin"),
        ("libvirt", "BackupEnd"),
        ("monitor", "Transaction"),
        ("offline", "ImageBitmap"),
    ],
)
def test_libvirt_goes_away_in_the_middle_of_a_create(
    engine: str,
    point: str,
    machine: Machine,
    daemon: Daemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _as_needed(machine, engine)
    scene = Scene(machine, tmp_path, engine)
    owner: Any = {"libvirt": LibvirtEngine, "monitor": MonitorEngine, "offline": OfflineEngine}[
        engine
    ]
    original = owner.perform

    def perform(self: Any, step: Any, outcome: Any) -> None:
        original(self, step, outcome)
        if type(step).__name__ == point:
            daemon.stop(kill=True)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "perform", perform)
        with pytest.raises(ConnectionFailed) as caught:
            scene.domain.create("c2")
    assert machine.name in str(caught.value)

    start_again(daemon, machine)
    scene.domain = domain_of(machine, tmp_path, engine)
    names = scene.settled()
    if "c2" in names:  # all was done but to say so
        assert point == "BackupEnd"
        scene.timeline.cut("c2")
    scene.timeline.scatter()
    scene.check(*names)


def test_libvirt_goes_away_between_two_commands(
    machine: Machine, daemon: Daemon, tmp_path: Path
) -> None:
    _as_needed(machine, "libvirt")
    scene = Scene(machine, tmp_path, "libvirt")
    before = files(tmp_path)
    daemon.stop(kill=True)
    with pytest.raises(ConnectionFailed):
        scene.domain.create("c2")
    with pytest.raises(ConnectionFailed):
        scene.domain.delete("c0")
    assert files(tmp_path) == before
    start_again(daemon, machine)
    scene.domain = domain_of(machine, tmp_path, "libvirt")
    assert scene.settled() == ["c0", "c1"]
    scene.check("c0", "c1")
