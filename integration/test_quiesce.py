"""--quiesce: frozen for the instant of the checkpoint, and thawed on every way out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ckptmgr
from ckptmgr.domain import freezing
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.engine.monitor import MonitorEngine
from integration.conftest import MakeMachine
from integration.evidence import domain_of, has_checkpoints, unchanged, wipe
from integration.fake_agent import FakeAgent, Guest, Refused
from integration.stand import MIB, DiskSpec, Machine, Stand

DISKS = (DiskSpec("vda", size=MIB),)
TIMEOUT = 1.0
"""Seconds that a guest may stand still, where the test is about their end."""
PATIENT = 60.0
"""And where it is not, however slow the machine is."""
MOMENTS = {"libvirt": (LibvirtEngine, "BackupBegin"), "monitor": (MonitorEngine, "Transaction")}


@dataclass
class Scene:
    """A running machine with an agent, and a checkpoint c0."""

    machine: Machine
    agent: FakeAgent
    store: Path

    def domain(self, engine: str | None = None, timeout: float = PATIENT) -> ckptmgr.Domain:
        """By default with the engine that fits."""
        engine = engine or ("libvirt" if has_checkpoints(self.machine) else "monitor")
        return domain_of(self.machine, self.store, engine, freeze_timeout=timeout)

    def fails(
        self, words: str, engine: str | None = None, timeout: float = PATIENT
    ) -> ckptmgr.GuestAgentFailed:
        """A create fails because of the agent, and changes nothing."""
        with (
            unchanged(self.machine, self.store),
            pytest.raises(ckptmgr.GuestAgentFailed, match=words) as caught,
        ):
            self.domain(engine, timeout).create("c1", quiesce=True)
        return caught.value

    def thawed(self) -> bool:
        """Whether the guest runs again before long."""
        deadline = time.monotonic() + PATIENT
        while self.agent.frozen and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.agent.frozen


@pytest.fixture
def scene(local: Stand, make_vm: MakeMachine, tmp_path: Path) -> Iterator[Scene]:
    folder = local.workspace.folder("q")  # a socket's path has to be short
    guest = Guest(folder / "t")
    with FakeAgent(folder / "a") as agent:
        machine = make_vm(DISKS, devices=agent.devices, commandline=guest.commandline)
        guest.open_port(machine)
        scene = Scene(machine, agent, tmp_path)
        scene.domain().create("c0")
        yield scene
        wipe(machine)


@pytest.mark.each_release
@pytest.mark.parametrize("engine", MOMENTS)
def test_frozen_for_the_instant_and_for_nothing_else(
    engine: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, instant = MOMENTS[engine]
    original: Any = owner.perform  # type: ignore[attr-defined]
    seen: list[tuple[str, bool]] = []

    def perform(self: Any, step: Any, outcome: Any) -> None:
        if type(step).__name__ != "Quiesced":
            seen.append((type(step).__name__, scene.agent.frozen))
        original(self, step, outcome)

    monkeypatch.setattr(owner, "perform", perform)
    view = scene.domain(engine).create("c1", quiesce=True)
    assert view.current
    assert scene.agent.commands == ["freeze", "thaw"]
    assert not scene.agent.frozen
    assert [name for name, frozen in seen if frozen] == [instant]
    assert ("ReadMaps", False) in seen
    seen.clear()
    scene.domain(engine).create("c2")
    assert scene.agent.commands == ["freeze", "thaw"]


@pytest.mark.parametrize("engine", MOMENTS)
def test_an_agent_that_refuses(engine: str, scene: Scene) -> None:
    def refuse() -> None:
        raise Refused("fsfreeze is disabled here")

    scene.agent.on["freeze"] = refuse
    scene.fails("fsfreeze is disabled here", engine)
    assert scene.agent.commands == ["freeze", "thaw"]  # some may have been frozen


def test_an_agent_that_is_slow_is_not_waited_for_and_is_thawed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has frozen, and answers, when it was given up."""
    given_up = threading.Event()
    original: Any = freezing._Guard._run

    def run(guard: Any) -> None:
        given_up.set()
        original(guard)

    monkeypatch.setattr(freezing._Guard, "_run", run)
    scene.agent.on["freeze"] = lambda: given_up.wait(PATIENT)
    scene.fails("not frozen", timeout=TIMEOUT)
    assert scene.thawed()
    assert scene.agent.commands[-1] == "thaw"


@pytest.mark.each_release
def test_an_agent_that_dies_after_it_has_frozen(scene: Scene) -> None:
    """Nobody can thaw any more: no checkpoint, and the user is told."""
    original = scene.domain().adapter  # looked up before
    assert original.active()
    scene.agent.on["thaw"] = scene.agent.die
    error = scene.fails("may still be frozen")
    assert "domfsthaw" in str(error.hint)


@pytest.mark.each_release
def test_a_thaw_that_fails_is_tried_again(scene: Scene) -> None:
    refusals = [Refused("busy"), Refused("busy")]

    def refuse() -> None:
        if refusals:
            raise refusals.pop()

    scene.agent.on["thaw"] = refuse
    assert scene.domain().create("c1", quiesce=True).name == "c1"
    assert scene.agent.commands == ["freeze", "thaw", "thaw", "thaw"]
    assert not scene.agent.frozen


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ckptmgr.OperationFailed])
def test_thawed_when_the_instant_fails(
    kind: type[BaseException], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = LibvirtEngine._begin

    def begin(self: Any, step: Any) -> None:
        original(self, step)
        assert scene.agent.frozen
        raise kind("in the middle")

    monkeypatch.setattr(LibvirtEngine, "_begin", begin)
    with unchanged(scene.machine, scene.store), pytest.raises(kind, match="in the middle"):
        scene.domain("libvirt").create("c1", quiesce=True)
    assert scene.agent.commands == ["freeze", "thaw"]


def test_thawed_at_the_deadline_while_the_instant_still_takes(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = LibvirtEngine._begin
    thawed: list[bool] = []

    def begin(self: Any, step: Any) -> None:
        thawed.append(scene.thawed())
        original(self, step)

    def sooner(*functions: Any, timeout: float, **options: Any) -> Any:
        """The guest's time is up soon, the agent's is not, however slow the machine is."""
        assert timeout == PATIENT
        return frozen(*functions, timeout=TIMEOUT, **options)

    frozen = freezing.frozen
    monkeypatch.setattr(freezing, "frozen", sooner)
    monkeypatch.setattr(LibvirtEngine, "_begin", begin)
    scene.fails("not quiescent", "libvirt")
    assert thawed == [True]
    assert scene.agent.commands == ["freeze", "thaw"]
