"""Killed at any step, and nothing is lost, orphaned or wrong that is not said to be.

The steps are enumerated: each operation runs again and again, and is killed one boundary later
each time, until it gets to its end.  Two operations at a time, on machines of their own.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import pytest

from ckptmgr.checkpoint import EngineName
from integration.kill import END, Scene, Victim, Warm
from integration.kill.scenarios import Case, Scenario, cases
from integration.kill.scene import SHAPES
from integration.stand import Daemon, Workspace

pytestmark = pytest.mark.together

LANES = 2

Points = list[str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --long, more cases."""
    if "case" in metafunc.fixturenames:
        found = cases(long=metafunc.config.getoption("--long"))
        ids = [f"{victim}-{scenario}" for victim, scenario in found]
        metafunc.parametrize("case", found, ids=ids)


class Lane:
    """A warm process, and a machine for each engine, made when it is first needed."""

    _making = threading.Lock()

    def __init__(self, daemon: Daemon, warm: Warm) -> None:
        self._daemon = daemon
        self._warm = warm
        self._made: dict[EngineName, Scene] = {}

    def scene(self, engine: EngineName) -> Scene:
        """The machine of an engine, without checkpoints."""
        if engine not in self._made:
            with self._making:
                self._made[engine] = Scene(self._daemon, self._warm, SHAPES[engine])
        scene = self._made[engine]
        scene.connect()
        scene.fresh()
        return scene

    def close(self) -> None:
        for scene in self._made.values():
            scene.connect()
            scene.machine.destroy()


class Lanes:
    """Runs cases ahead of the tests that ask for them; those that kill libvirtd come last."""

    def __init__(self, daemon: Daemon, warm: list[Warm]) -> None:
        self._lanes = [Lane(daemon, each) for each in warm]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        self._executor = ThreadPoolExecutor(len(warm))
        self._running: dict[Case, Future[Points]] = {}

    def begin(self, cases: list[Case]) -> None:
        """Begin those that can be run beside each other."""
        for case in cases:
            if case[0] is not Victim.LIBVIRTD:
                self._running[case] = self._executor.submit(self._run, case)

    def result(self, case: Case) -> Points:
        """The boundaries of a case at which somebody was killed."""
        if case not in self._running:
            self._executor.shutdown()
            self._running[case] = Future()
            try:
                self._running[case].set_result(self._run(case))
            except BaseException as error:
                self._running[case].set_exception(error)
                raise
        return self._running[case].result()

    def _run(self, case: Case) -> Points:
        lane = self._free.get()
        try:
            return _every_point(lane.scene(case[1].engine), *case)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
        for lane in self._lanes:
            lane.close()


@pytest.fixture(scope="module")
def lanes(request: pytest.FixtureRequest, workspace: Workspace, daemon: Daemon) -> Iterator[Lanes]:
    wanted = _chosen(request.session.items)
    with ExitStack() as stack:
        environment = daemon.environment()
        warm = [stack.enter_context(Warm(workspace, environment)) for _ in range(LANES)]
        lanes = Lanes(daemon, warm)
        stack.callback(lanes.close)
        lanes.begin(wanted)
        yield lanes


def _chosen(items: list[pytest.Item]) -> list[Case]:
    """The cases of the tests that are to be run."""
    functions = [item for item in items if isinstance(item, pytest.Function)]
    ours = [each for each in functions if each.function is test_killed_at_every_step]
    return [each.callspec.params["case"] for each in ours]


def test_killed_at_every_step(lanes: Lanes, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The next create goes on, check is clean or says what was lost, and every diff is exact."""
    points = lanes.result(case)
    with capsys.disabled():
        print(f"\n{case[1]}: {case[0]} killed at {len(points)} points")


def test_our_process_was_killed_at_a_hundred_points_at_least(
    request: pytest.FixtureRequest, lanes: Lanes, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: Counter[Victim] = Counter()
    for case in _chosen(request.session.items):
        tried[case[0]] += len(lanes.result(case))
    with capsys.disabled():
        print(f"\nkilled: {', '.join(f'{who} {count} times' for who, count in tried.items())}")
    assert tried[Victim.PROCESS] >= 100


def _every_point(scene: Scene, victim: Victim, scenario: Scenario) -> Points:
    """Kill at every boundary, each time in a new run of the operation."""
    tried: Points = []
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
