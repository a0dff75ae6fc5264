"""Killed at any step, and nothing is lost, orphaned or wrong that is not said to be.

The steps are enumerated: each operation runs again and again, and is killed one boundary later
each time, until it gets to its end.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from ckptmgr.checkpoint import EngineName
from integration.kill import END, Scene, Victim, Warm
from integration.kill.scenarios import Case, Scenario, cases
from integration.kill.scene import SHAPES
from integration.stand import Daemon, Workspace

LEAST = 15
"""Points at which our process is killed in each case that is tried at all of them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --long, more cases."""
    if "case" in metafunc.fixturenames:
        found = cases(long=metafunc.config.getoption("--long"))
        ids = [f"{victim}-{scenario}" for victim, scenario in found]
        metafunc.parametrize("case", found, ids=ids)


class Lane:
    """A warm process, and a machine for each engine, made when it is first needed."""

    def __init__(self, daemon: Daemon, warm: Warm) -> None:
        self._daemon = daemon
        self._warm = warm
        self._made: dict[EngineName, Scene] = {}

    def scene(self, engine: EngineName) -> Scene:
        """The machine of an engine, without checkpoints."""
        if engine not in self._made:
            self._made[engine] = Scene(self._daemon, self._warm, SHAPES[engine])
        scene = self._made[engine]
        scene.connect()
        scene.fresh()
        return scene

    def close(self) -> None:
        for scene in self._made.values():
            scene.connect()
            scene.machine.destroy()


@pytest.fixture(scope="module")
def lane(workspace: Workspace, daemon: Daemon) -> Iterator[Lane]:
    with Warm(workspace, daemon.environment()) as warm:
        lane = Lane(daemon, warm)
        yield lane
        lane.close()


@pytest.mark.timeout(1800)
def test_killed_at_every_step(
    lane: Lane, case: Case, record_property: Callable[[str, object], None]
) -> None:
    """The next create goes on, check is clean or says what was lost, and every diff is exact."""
    victim, scenario = case
    points = _every_point(lane.scene(scenario.engine), victim, scenario)
    record_property("killed", [f"{scenario}", f"{victim}", len(points)])
    if victim is Victim.PROCESS and not scenario.steps_only:
        assert len(points) >= LEAST


def test_our_process_is_killed_at_a_hundred_points_at_least() -> None:
    ours = [scenario for victim, scenario in cases(long=False) if victim is Victim.PROCESS]
    whole = [scenario for scenario in ours if not scenario.steps_only]
    assert LEAST * len(whole) >= 100


def _every_point(scene: Scene, victim: Victim, scenario: Scenario) -> list[str]:
    """Kill at every boundary, each time in a new run of the operation."""
    tried: list[str] = []
    for point in itertools.count(1):
        try:
            tried.append(_one_point(scene, victim, scenario, point))
        except BaseException as error:
            error.add_note(f"{victim} killed at point {point} of: {scenario}; before: {tried[-1:]}")
            raise
        if tried[-1] == END:
            break
    scene.require_exact_until_now()
    if victim is Victim.PROCESS:
        scene.require_swept_store()
    return tried


def _one_point(scene: Scene, victim: Victim, scenario: Scenario, point: int) -> str:
    """Kill at one boundary, go on, and look; returns the boundary."""
    if victim is not Victim.PROCESS:
        scene.fresh()  # or else it takes other steps each time
    task = scenario.prepare(scene)
    scene.sweep()
    scene.write()
    if task.operation == "create":
        scene.made(str(task.arguments["name"]))
    steps_only = scenario.steps_only or victim is not Victim.PROCESS
    outcome = scene.kill(task, victim, point, steps_only=steps_only)
    assert outcome.struck, outcome.error
    if victim in (Victim.PROCESS, Victim.HOST):
        assert outcome.status == -signal.SIGKILL, outcome.error
    scene.restart(victim)
    if victim in (Victim.QEMU, Victim.HOST):
        scene.lose_next()
        lost = partial(_says_what_was_lost, unfinished=scenario.unfinished)
        scenario = replace(scenario, after=lost)
    scene.write()
    scene.create()
    scenario.after(scene)
    scene.require_nothing_left()
    scene.require_exact()
    return outcome.struck


def _says_what_was_lost(scene: Scene, unfinished: frozenset[str]) -> None:
    """The bitmaps that QEMU had not written yet, and where libvirt's list does not fit."""
    findings = scene.findings()
    lost = {finding for finding in findings if finding.code in LOST_WITH_QEMU}
    listed = {finding for finding in findings if finding.code in SHOWN_ANEW | unfinished}
    assert lost | listed == set(findings)
    assert scene.line[-1] not in {finding.checkpoint for finding in lost}
    scene.free.repair(foreign="orphan-bitmap" in unfinished)
    scene.require_clean()


LOST_WITH_QEMU = {"missing-bitmap", "inconsistent-bitmap"}
SHOWN_ANEW = {"libvirt-stale", "wrong-parent"}
