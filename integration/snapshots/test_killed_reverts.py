"""Killed at any step, a revert or snapshot is completed or taken back by the next command."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import block_jobs
from integration.branch_model import Branches
from integration.conftest import MakeMachine
from integration.kill import END, Outcome, Task, Warm
from integration.kill.scene import await_orphans, orphans
from integration.stand import Daemon, Workspace, await_rest

from .scene import DISKS, SNAPSHOTS

pytestmark = SNAPSHOTS


def _task(scene: Branches, operation: str, point: int, **arguments: object) -> Task:
    return Task(
        uri=scene.machine.uri,
        store=str(scene.store),
        domain=scene.machine.name,
        engine=scene.engine,
        operation=operation,
        arguments=arguments,
        point=point,
        steps_only=not os.environ.get("CKPTMGR_TEST_AT_LEISURE"),
    )


def _killed(daemon: Daemon, warm: Warm, task: Task) -> Outcome:
    """Run a task that is killed; what it had asked of others, and begun, is over then."""
    before = orphans()
    outcome = warm.run(task)
    assert outcome.status == -signal.SIGKILL, outcome.error
    await_orphans(before)
    await_rest(daemon.pid)
    return outcome


@pytest.fixture
def warm(daemon: Daemon, workspace: Workspace) -> Iterator[Warm]:
    with Warm(workspace, daemon.environment()) as warm:
        yield warm


def _branched(scene: Branches, snapshot: str) -> str:
    """What the next command has made of an interrupted revert: the name of its checkpoint, or
    nothing if it had not begun.
    """
    new = {each.name for each in scene.domain.checkpoints().checkpoints} - set(scene.points)
    if not new:
        return ""
    (name,) = new
    scene.reverted(snapshot, name)
    scene.require_tree()
    return name


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_revert_that_was_killed_at_each_step(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, engine: str, tmp_path: Path
) -> None:
    """The next command completes it: nothing was written meanwhile, and the machine runs."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", engine)
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.scatter(2)
    scene.create("c2")
    tried = []
    for point in itertools.count(1):
        scene.scatter(2 + point)
        left = str(scene.at)
        outcome = _killed(daemon, warm, _task(scene, "revert_snapshot", point, name="s1"))
        tried.append(outcome.struck)
        scene.domain.diff("c1")
        made = _branched(scene, "s1")
        where = f"killed {outcome.struck}, point {point}"
        assert scene.state() == "running", where
        assert not (scene.store / scene.domain.view.uuid / "intent.json").exists(), where
        scene.scatter(100 + point)
        for start, end in (("c1", made), ("c2", made), (left, made), (made, None), (left, None)):
            if start and end != "":
                scene.check(start, end)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        # so that the tree stays small
        if made and left not in ("c1", "c2"):
            scene.domain.delete(left)
            scene.deleted(left)
        if outcome.struck == END:
            break
    print(f"killed at {len(tried)} points: {tried}")


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_revert_to_an_image_that_has_left_is_killed_while_bitmaps_are_taken_out(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Of the disk and of the image that comes back, which no QEMU has open."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", "libvirt")
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.loose = True  # a job copies, and where it copies to is marked
    original = scene.machine.images["vda"]
    tried: list[str] = []
    for point in itertools.count(12):  # just before the intent
        if scene.machine.images["vda"] == original:
            original.with_suffix(".copy").unlink(missing_ok=True)
            block_jobs.copy(scene.machine, "vda")
            scene.find()
        scene.scatter(1 + point)
        outcome = _killed(daemon, warm, _task(scene, "revert_snapshot", point, name="s1"))
        tried.append(outcome.struck)
        scene.domain.diff("c1")
        made = _branched(scene, "s1")
        where = f"killed {outcome.struck}, point {point}"
        assert scene.state() == "running", where
        assert (scene.machine.images["vda"] == original) == bool(made), where
        scene.scatter(100 + point)
        if made:
            scene.check("c1", made)
            scene.check(made, None)
        scene.check("c1", None)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        if outcome.struck == "in the middle of revert":
            break
    assert any("offline ImageBitmap" in each for each in tried), tried
    print(f"killed at {len(tried)} points: {tried}")


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_snapshot_with_a_checkpoint_that_was_killed_at_each_step(
    daemon: Daemon, warm: Warm, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Whatever is there afterwards is right, and the machine runs."""
    scene = Branches(make_vm_on(daemon, DISKS, state="running"), tmp_path / "store", "libvirt")
    scene.create("c1")
    for point in itertools.count(1):
        scene.scatter(point)
        name = f"s{point}"
        task = _task(scene, "create_snapshot", point, name=name, checkpoint=True)
        outcome = _killed(daemon, warm, task)
        where = f"killed {outcome.struck}, point {point}"
        scene.domain.diff("c1")
        new = {each.name for each in scene.domain.checkpoints().checkpoints} - set(scene.points)
        for made in new:
            scene.made(made)
        taken = {each.name: each for each in scene.domain.snapshots()}
        if name in taken:
            assert taken[name].checkpoint == scene.at, where
            scene.taken(name)
        assert scene.state() == "running", where
        scene.check("c1", None)
        assert not [each for each in scene.domain.check() if not each.harmless], where
        if outcome.struck == END:
            break
