"""A restore point is one instant of all disks, whatever the guest does; frozen, standing still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.engine.monitor import MonitorEngine
from ckptmgr.operation.headroom import RESERVE
from integration.conftest import MakeMachine
from integration.evidence import domain_of, everything
from integration.fake_agent import FakeAgent, Guest, Refused
from integration.stand import MIB, Daemon, DiskSpec, Machine
from integration.stand.guest import Guest as LinuxGuest
from integration.stand.patience import patiently
from integration.test_backup import Backups, disk_in

PATIENT = 60.0
"""Seconds that a guest may stand still: no test is about their end."""
STEP = 8192
MOMENTS = {"libvirt": (LibvirtEngine, "BackupBegin"), "monitor": (MonitorEngine, "Transaction")}


class Configured(Backups):
    """`Backups` with settings."""

    settings: dict[str, Any]

    @contextmanager
    def domain(self) -> Iterator[ckptmgr.Domain]:
        yield domain_of(self.machine, self.store, self.engine, **self.settings)


def configured(machine: Machine, folder: Path, engine: str, **settings: Any) -> Configured:
    made = Configured(machine, folder)
    made.engine = engine
    made.settings = settings
    return made


def written(disk: bytes) -> int:
    """How many of the guest's writes are on a disk: no later one without all before it."""
    count = 0
    while disk[count * STEP : count * STEP + 4096] == bytes([count % 255 + 1]) * 4096:
        count += 1
    rest = disk[count * STEP :]
    assert rest == bytes(len(rest)), f"a write after number {count} is there, and it is not"
    return count


@pytest.mark.parametrize("engine", MOMENTS)
def test_the_disks_are_those_of_one_instant_while_the_guest_writes(
    engine: str, daemon: Daemon, tmp_path: Path
) -> None:
    """It writes the same to two disks in turn, each write after the other is on the disk."""
    # room for more writes than there can be in the time of three backups, also on KVM
    disks = [DiskSpec("vda", size=128 * MIB), DiskSpec("vdb", size=128 * MIB)]
    with LinuxGuest(daemon, disks) as guest:
        vm = configured(guest.machine, tmp_path, engine)
        guest.shell.churn("vda,vdb", STEP, 16000)
        counts = []
        for name in ("p1", "p2", "p3"):
            guest.shell.wait_churned(guest.shell.churned[-1] + 5 if guest.shell.churned else 5)
            before = guest.shell.churned[-1] + 1
            made = vm.take(name, held={"": b""}, limit=4 * MIB)
            first, second = (written(disk_in(vm.image(made, each))) for each in ("vda", "vdb"))
            assert before <= second <= first <= second + 1
            assert all(disk.reason is None for disk in made.disks) or name == "p1"
            counts.append(second)
        assert counts == sorted(counts)
        guest.shell.wait_churned(counts[-1])
        guest.shell.stop_churn()
        last = guest.shell.churned[-1] + 1
        made = vm.take("p4", held={"": b""})
        assert [written(disk_in(vm.image(made, each))) for each in ("vda", "vdb")] == [last, last]
        assert counts[-1] < last or not guest.shell.churned


# --- frozen -----------------------------------------------------------------------------------


class Frozen(Configured):
    """A machine with an agent."""

    agent: FakeAgent

    def watched(self, name: str, **options: Any) -> None:
        """A point; the guest is not frozen while its disks are copied."""
        seen: list[bool] = []
        self.scatter(5)
        self.take(name, progress=lambda *_: seen.append(self.agent.frozen), **options)
        assert seen
        assert not any(seen)


@pytest.fixture
def frozen(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> Iterator[Callable[[str], Frozen]]:
    folder = daemon.workspace.folder("q")  # a socket's path has to be short
    guest = Guest(folder / "t")
    with FakeAgent(folder / "a") as agent:

        def make(engine: str, form: str = "qcow2") -> Frozen:
            machine = make_vm_on(
                daemon,
                [DiskSpec("vda", size=2 * MIB, format=form)],
                devices=agent.devices,
                commandline=guest.commandline,
            )
            guest.open_port(machine)
            made = Frozen(machine, tmp_path)
            made.engine, made.settings, made.agent = engine, {"freeze_timeout": PATIENT}, agent
            return made

        yield make


@pytest.mark.parametrize("engine", MOMENTS)
@pytest.mark.parametrize("quiesce", [None, True])
def test_frozen_for_the_instant_alone(
    engine: str,
    quiesce: bool | None,
    frozen: Callable[[str], Frozen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm = frozen(engine)
    owner, instant = MOMENTS[engine]
    original: Any = owner.perform  # type: ignore[attr-defined]
    seen: list[str] = []

    def perform(self: Any, step: Any, outcome: Any) -> None:
        if type(step).__name__ != "Quiesced" and vm.agent.frozen:
            seen.append(type(step).__name__)
        original(self, step, outcome)

    monkeypatch.setattr(owner, "perform", perform)
    for number, name in enumerate(("p1", "p2"), 1):
        vm.watched(name, quiesce=quiesce)
        assert vm.agent.commands == ["freeze", "thaw"] * number
        assert seen == [instant] * number
    vm.watched("p3", quiesce=False)
    assert len(vm.agent.commands) == 4


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_an_agent_that_fails_costs_a_warning_or_with_quiesce_the_backup(
    form: str, frozen: Callable[..., Frozen], caplog: pytest.LogCaptureFixture
) -> None:
    vm = frozen("libvirt", form)

    def refuse() -> None:
        raise Refused("fsfreeze is disabled here")

    vm.agent.on["freeze"] = refuse
    vm.watched("p1")
    assert "not frozen for this backup" in caplog.text
    assert "fsfreeze is disabled here" in caplog.text
    before = everything(vm.machine, vm.store)
    with pytest.raises(ckptmgr.GuestAgentFailed, match="fsfreeze is disabled here"):
        vm.take("p2", quiesce=True)
    after = everything(vm.machine, vm.store)
    assert after == before
    assert not vm.agent.frozen
    points = ckptmgr.repository(vm.repository).points().points
    assert [point.name for point in points] == ["p1"]
    assert not list(vm.repository.glob("*/.*"))


def test_thawed_when_what_comes_after_fails(frozen: Callable[[str], Frozen]) -> None:
    vm = frozen("libvirt")

    def fail(*_: object) -> None:
        assert vm.agent.commands == ["freeze", "thaw"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vm.take("p1", progress=fail, quiesce=True)
    assert not vm.agent.frozen
    assert vm.machine.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE


FROZEN = """
import contextlib, os, signal, sys
import ckptmgr
from ckptmgr.domain import thawing
from ckptmgr.engine.libvirt import LibvirtEngine

uri, store, domain, repository, guarded = sys.argv[1:]
if guarded == "no":
    thawing.guarded = lambda *_: contextlib.nullcontext()
perform = LibvirtEngine.perform


def killed(self, step, outcome):
    if type(step).__name__ == "BackupBegin":
        os.kill(os.getpid(), signal.SIGKILL)
    perform(self, step, outcome)


LibvirtEngine.perform = killed
with ckptmgr.connect(uri, store=store, engine="libvirt") as host:
    host.domain(domain).backup(repository, "killed", quiesce=True)
"""


@pytest.mark.parametrize("form", ["qcow2", "raw"])
@pytest.mark.parametrize("guarded", [True, False], ids=["at once", "by the next command"])
def test_a_guest_that_is_frozen_because_of_us_is_thawed_after_a_kill(
    form: str, guarded: bool, frozen: Callable[..., Frozen]
) -> None:
    vm = frozen("libvirt", form)
    first = vm.take("first", quiesce=False)
    where = [vm.machine.uri, str(vm.store), vm.machine.name, str(vm.repository)]
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, *where, "yes" if guarded else "no"],
        check=False,
        timeout=patiently(120),
    )
    assert done.returncode == -signal.SIGKILL
    assert vm.agent.commands[0] == "freeze"
    if guarded:
        deadline = time.monotonic() + patiently(60)
        while vm.agent.frozen:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    else:
        assert vm.agent.frozen
    vm.scatter(1)
    second = vm.take("second", quiesce=False)
    assert not vm.agent.frozen
    # Once more than needed does no harm: nobody knows what was done before.
    assert vm.agent.commands[0] == "freeze"
    assert set(vm.agent.commands[1:]) == {"thaw"}
    vm.check(first, second)


# --- standing still -----------------------------------------------------------------------------


def stands_still(machine: Machine) -> bool:
    return bool(machine.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


@pytest.mark.parametrize(
    ("engine", "form"), [*((each, "qcow2") for each in MOMENTS), ("libvirt", "raw")]
)
def test_it_stands_still_for_the_instant_alone(
    engine: str,
    form: str,
    daemon: Daemon,
    make_vm_on: MakeMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = make_vm_on(daemon, [DiskSpec("vda", size=2 * MIB, format=form)], state="running")
    vm = configured(machine, tmp_path, engine)
    owner, instant = MOMENTS[engine]
    original: Any = owner.perform  # type: ignore[attr-defined]
    seen: list[bool] = []

    def perform(self: Any, step: Any, outcome: Any) -> None:
        if type(step).__name__ == instant:
            seen.append(stands_still(machine))
        original(self, step, outcome)

    monkeypatch.setattr(owner, "perform", perform)
    copying: list[bool] = []
    vm.scatter(1)
    made = vm.take("p1", pause=True, progress=lambda *_: copying.append(stands_still(machine)))
    vm.check(made)
    assert seen
    assert all(seen)
    assert copying
    assert not any(copying)
    assert not stands_still(machine)
    machine.domain.suspend()
    vm.take("p2", pause=True)
    assert stands_still(machine), "it stood still before"
    with pytest.raises(ckptmgr.InvalidRequest, match="stands still"):
        vm.take("p3", pause=True, quiesce=True)


KILLED = """
import os, signal, sys
import ckptmgr
from ckptmgr.operation import pausing

uri, store, domain, repository = sys.argv[1:]
pausing.resume = lambda adapter: os.kill(os.getpid(), signal.SIGKILL)
with ckptmgr.connect(uri, store=store) as host:
    host.domain(domain).backup(repository, "killed", pause=True)
"""


def test_a_domain_that_stands_still_because_of_us_runs_again_after_a_kill(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm_on(daemon, [DiskSpec("vda", size=2 * MIB)], state="running")
    vm = configured(machine, tmp_path, "auto")
    first = vm.take("first")
    vm.scatter(1)
    words = [machine.uri, str(vm.store), machine.name, str(vm.repository)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], check=False, timeout=patiently(120)
    )
    assert done.returncode == -signal.SIGKILL
    assert stands_still(machine)
    vm.scatter(2)
    second = vm.take("second")
    assert not stands_still(machine)
    assert second.disks[0].reason is None
    vm.check(first, second)


# --- what the guest overwrites meanwhile ----------------------------------------------------------


@pytest.mark.parametrize("engine", MOMENTS)
def test_the_guest_never_runs_out_of_room_for_what_it_overwrites(
    engine: str, daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """The backup gives up while there is some left; what the guest writes is not lost."""
    size = 160 * MIB
    machine = make_vm_on(daemon, [DiskSpec("vda", size=size)], state="running")
    folder = daemon.workspace.folder("s")
    command = ["mount", "-t", "tmpfs", "-o", "size=180m,mode=777", "tmpfs", str(folder)]
    subprocess.run(command, check=True)
    try:
        vm = configured(machine, tmp_path, engine, socket_directory=folder)
        vm.io("vda", f"write -P 17 0 {size}")
        first = vm.take("first")
        vm.io("vda", f"write -P 18 0 {size}")
        place = 0
        gone = []

        def overwrite(*_: object) -> None:
            nonlocal place
            for _number in range(4):
                if place < size:
                    # QEMU would answer with an error if it had no room.
                    vm.io("vda", f"write -P 19 {size - place - MIB} {MIB}")
                    place += MIB
            left = os.statvfs(folder)
            gone.append(left.f_bavail * left.f_frsize)

        with pytest.raises(ckptmgr.OperationFailed, match="MiB left") as caught:
            vm.take("second", held={"": b""}, progress=overwrite, limit=8 * MIB)
        assert str(folder) in caught.value.message
        assert "socket_directory" in str(caught.value.hint)
        assert 0 < min(gone) < RESERVE
        assert machine.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        assert machine.holds("vda", size - place, place, 19)
        assert list(folder.iterdir()) == []
        vm.settings = {}
        third = vm.take("third")
        assert third.disks[0].reason is None
        vm.check(third)
        assert first
    finally:
        machine.destroy()
        subprocess.run(["umount", "-l", str(folder)], check=True)
