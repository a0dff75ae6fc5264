"""Fifty processes on one domain at once: one after the other, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.errors import Busy
from ckptmgr.views import DiffView
from integration.kill import Outcome, Scene, Task, Warm
from integration.kill.scene import SHAPES
from integration.stand import Daemon, Workspace

PROCESSES = 50


@pytest.fixture
def scene(workspace: Workspace, daemon: Daemon) -> Iterator[Scene]:
    """A machine with one checkpoint, c1."""
    with Warm(workspace, daemon.environment()) as warm:
        scene = Scene(daemon, warm, SHAPES[EngineName.LIBVIRT])
        scene.write()
        scene.create()
        yield scene
        scene.machine.destroy()


def _tasks(scene: Scene) -> Iterator[Task]:
    """Each makes a checkpoint; every third deletes its own again, every fourth looks around."""
    for number in range(PROCESSES):
        name = f"p{number}"
        rest: list[tuple[str, dict[str, object]]] = [("checkpoints", {})]
        if number % 4 == 0:
            rest += [("diff", {"start": "c1"}), ("checkpoint", {"name": name, "size": True})]
        if number % 3 == 0:
            rest.append(("delete", {"name": name}))
        yield replace(scene.task("create", name=name), rest=rest, lock_timeout=1000)


def _run_while_writing(scene: Scene, tasks: list[Task]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    running = threading.Thread(target=lambda: outcomes.extend(scene.warm.run_all(tasks)))
    running.start()
    while running.is_alive():
        scene.write()
        running.join(0.05)
    return outcomes


def _extents(diff: DiffView) -> dict[str, set[int]]:
    """target -> the granules that changed."""
    found = {}
    for disk in diff.disks:
        assert disk.known, disk.reason
        assert disk.granularity is not None
        found[disk.name] = {
            granule
            for start, length in disk.extents()
            for granule in range(
                start // disk.granularity, -(-(start + length) // disk.granularity)
            )
        }
    return found


@pytest.mark.timeout(1200)
def test_fifty_processes_create_delete_and_list_at_once(scene: Scene) -> None:
    tasks = list(_tasks(scene))
    outcomes = _run_while_writing(scene, tasks)
    assert [outcome.error for outcome in outcomes] == [""] * PROCESSES
    assert [outcome.status for outcome in outcomes] == [0] * PROCESSES

    kept = {f"p{number}" for number in range(PROCESSES) if number % 3}
    line = scene.line
    assert line[0] == "c1"
    assert set(line) == {"c1", *kept}
    assert {view.name for view in scene.domain.checkpoints().checkpoints} == set(line)
    scene.require_clean()
    scene.require_nothing_left()

    # Writes went on meanwhile: which interval has one is not known here, but some has, and each.
    scene.require_exact_since("c1")
    found: dict[str, set[int]] = {}
    for start, end in zip(line, (*line[1:], None), strict=True):
        for disk, granules in _extents(scene.domain.diff(start, end)).items():
            found.setdefault(disk, set()).update(granules)
    assert found == _extents(scene.domain.diff("c1"))


def test_who_does_not_wait_is_told_that_the_domain_is_busy(scene: Scene) -> None:
    tasks = [
        replace(scene.task("create", name=f"p{number}"), lock_timeout=0)
        for number in range(PROCESSES)
    ]
    outcomes = scene.warm.run_all(tasks)
    made = {f"p{number}" for number, outcome in enumerate(outcomes) if outcome.status == 0}
    refused = [outcome for outcome in outcomes if outcome.status != 0]
    assert made
    assert refused
    assert {outcome.status for outcome in refused} == {Busy.exit_status} == {5}
    assert all(outcome.error.startswith("busy: ") for outcome in refused)
    assert set(scene.line) == {"c1", *made}
    scene.require_clean()
    scene.require_nothing_left()
