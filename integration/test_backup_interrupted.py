"""A backup that is killed at any step: no half point, nothing left, and no interval lost.

The steps are enumerated as those of test_kill_points.py: the backup runs again and again, and is
killed one boundary later each time, until it gets to its end.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from ckptmgr.checkpoint import EngineName
from integration.kill import END, Victim, Warm
from integration.kill.backups import POINTS_MAX, BackupScene
from integration.kill.scene import RAW, SHAPES
from integration.stand import Daemon, Workspace

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


@pytest.fixture(scope="module")
def warm(workspace: Workspace, daemon: Daemon) -> Iterator[Warm]:
    with Warm(workspace, daemon.environment()) as warm:
        yield warm


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_at_every_step(
    daemon: Daemon, warm: Warm, case: Case, record_property: Callable[[str, object], None]
) -> None:
    """The next backup goes on, all points are whole, and every one holds what was there."""
    shapes = RAW if case.raw else SHAPES
    scene = BackupScene(daemon, warm, shapes[case.engine])
    try:
        points = _every_point(scene, case)
    finally:
        scene.connect()
        scene.machine.destroy()
    record_property("killed", [f"backup, {case}", f"{case.victim}", len(points)])


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
