"""A backup that is killed at any step: no half point, nothing left, and no interval lost.

The steps are enumerated as those of test_kill_points.py: the backup runs again and again, and is
killed one boundary later each time, until it gets to its end.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue

import pytest

from ckptmgr.checkpoint import EngineName
from integration.kill import END, Victim, Warm
from integration.kill.backups import POINTS_MAX, BackupScene
from integration.kill.scene import RAW, SHAPES
from integration.stand import Daemon, Workspace

pytestmark = pytest.mark.together

LANES = 2
LOST_WITH_QEMU = {"missing-bitmap", "inconsistent-bitmap"}
SHOWN_ANEW = {"libvirt-stale", "wrong-parent"}


@dataclass(frozen=True)
class Case:
    """Who is killed in which backup.

    steps_only -- the file system's calls do not count
    raw -- there are raw disks alone, so that it makes no checkpoint
    """

    victim: Victim
    engine: EngineName
    first: bool = False
    steps_only: bool = False
    raw: bool = False

    def __str__(self) -> str:
        which = "first" if self.first else "later"
        which += "-raw" if self.raw else ""
        return f"{self.victim}-{which}-{self.engine}"


_LIBVIRT, _MONITOR, _OFFLINE = EngineName

CASES = (
    Case(Victim.PROCESS, _LIBVIRT, first=True),
    Case(Victim.PROCESS, _LIBVIRT),
    Case(Victim.PROCESS, _LIBVIRT, raw=True),
    Case(Victim.QEMU, _LIBVIRT, raw=True, steps_only=True),
    Case(Victim.PROCESS, _OFFLINE, raw=True, steps_only=True),
    Case(Victim.PROCESS, _MONITOR, steps_only=True),
    Case(Victim.PROCESS, _OFFLINE, steps_only=True),
    Case(Victim.QEMU, _LIBVIRT, steps_only=True),
    Case(Victim.QEMU, _MONITOR, steps_only=True),
    Case(Victim.HOST, _LIBVIRT, steps_only=True),
    Case(Victim.LIBVIRTD, _LIBVIRT, steps_only=True),
)


class Lanes:
    """Runs cases ahead of the tests that ask for them; those that kill libvirtd come last."""

    def __init__(self, daemon: Daemon, warm: list[Warm], cases: list[Case]) -> None:
        self._daemon = daemon
        self._warm: SimpleQueue[Warm] = SimpleQueue()
        for each in warm:
            self._warm.put(each)
        self._executor = ThreadPoolExecutor(len(warm))
        self._running: dict[Case, Future[list[str]]] = {
            case: self._executor.submit(self._run, case)
            for case in cases
            if case.victim is not Victim.LIBVIRTD
        }

    def result(self, case: Case) -> list[str]:
        """The boundaries of a case at which somebody was killed."""
        if case in self._running:
            return self._running[case].result()
        self._executor.shutdown()
        return self._run(case)

    def _run(self, case: Case) -> list[str]:
        warm = self._warm.get()
        try:
            shapes = RAW if case.raw else SHAPES
            scene = BackupScene(self._daemon, warm, shapes[case.engine])
            try:
                return _every_point(scene, case)
            finally:
                scene.connect()
                scene.machine.destroy()
        finally:
            self._warm.put(warm)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def lanes(request: pytest.FixtureRequest, workspace: Workspace, daemon: Daemon) -> Iterator[Lanes]:
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    ours = [each for each in functions if each.function is test_killed_at_every_step]
    wanted = [each.callspec.params["case"] for each in ours]
    with ExitStack() as stack:
        warm = [stack.enter_context(Warm(workspace, daemon.environment())) for _ in range(LANES)]
        lanes = Lanes(daemon, warm, wanted)
        stack.callback(lanes.close)
        yield lanes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_at_every_step(lanes: Lanes, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The next backup goes on, all points are whole, and every one holds what was there."""
    points = lanes.result(case)
    with capsys.disabled():
        print(f"\nbackup, {case}: killed at {len(points)} points")


def _every_point(scene: BackupScene, case: Case) -> list[str]:
    tried: list[str] = []
    for point in itertools.count(1):
        try:
            tried.append(_one_point(scene, case, point))
        except BaseException as error:
            error.add_note(f"killed at point {point} of {case}; before: {tried[-1:]}")
            raise
        if tried[-1] == END:
            break
    scene.require_bytes(again=True)
    scene.require_sound()
    if not case.raw:
        scene.require_exact_until_now()
    return tried


def _one_point(scene: BackupScene, case: Case, point: int) -> str:
    """Kill at one boundary, go on, and look; returns the boundary."""
    if case.first or case.victim is not Victim.PROCESS or len(scene.points()) >= POINTS_MAX:
        scene.begin()  # for a crash, or else it takes other steps each time
    if not case.first and not scene.points():
        scene.backup()
    task = scene.prepare()
    scene.sweep()
    outcome = scene.kill(task, case.victim, point, steps_only=case.steps_only)
    assert outcome.struck, outcome.error
    if case.victim in (Victim.PROCESS, Victim.HOST):
        assert outcome.status == -signal.SIGKILL, outcome.error
    elif outcome.struck != END:
        assert outcome.status in (0, 1), outcome.error
        assert outcome.status == 0 or outcome.error
    scene.restart(case.victim)
    crashed = case.victim in (Victim.QEMU, Victim.HOST)
    if crashed:
        scene.lose_next()
        scene.look_at_disks()
    newest = scene.backup()
    scene.require_whole(newest)
    scene.require_bytes()
    if crashed and not case.raw:
        _says_what_was_lost(scene)
    else:
        scene.require_clean()
        if not case.first and not case.raw:
            assert scene.reasons(newest) == []
    scene.require_nothing_left()
    if not crashed:
        scene.require_exact()
    return outcome.struck


def _says_what_was_lost(scene: BackupScene) -> None:
    findings = scene.findings()
    assert {finding.code for finding in findings} <= LOST_WITH_QEMU | SHOWN_ANEW
    scene.free.repair()
    scene.require_clean()
