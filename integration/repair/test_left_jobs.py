"""Jobs and intents that a killed process left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ckptmgr.document import format_libvirt
from ckptmgr.engine.monitor import listening
from ckptmgr.store import Intent, Store
from integration.evidence import bitmaps

from .scene import BOTH, NAMES, Scene, running


def _socket(scene: Scene) -> str:
    return str(scene.domain.adapter.runtime_directory() / "ckptmgr.sock")


def _begin_backup(scene: Scene) -> None:
    """What a process leaves that is killed while it reads a bitmap through libvirt."""
    path = _socket(scene)
    scratch = path.replace(".sock", "-vda.scratch")
    scene.machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{path}'/><disks>"
        "<disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c2'>"
        f"<driver type='qcow2'/><scratch file='{scratch}'/></disk></disks></domainbackup>",
        None,
        0,
    )


def _begin_export(scene: Scene) -> None:
    """The same through the monitor."""
    address = {"type": "unix", "data": {"path": _socket(scene)}}
    scene.machine.qmp("nbd-server-start", addr=address)
    node = scene.machine.node("vda")
    scene.machine.qmp("block-dirty-bitmap-add", node=node, name="ckptmgr-vda", disabled=True)


@running
@pytest.mark.parametrize("begin", [_begin_backup, _begin_export])
def test_the_job_of_a_killed_process(scene: Scene, begin: Callable[[Scene], None]) -> None:
    begin(scene)
    codes = {"leftover-job", "leftover-files"}
    if begin is _begin_export:
        codes.add("leftover-bitmap")
    scene.heals(*codes, first=False)  # a diff would end it


@running
@pytest.mark.parametrize("begin", [_begin_backup, _begin_export])
@pytest.mark.parametrize("command", ["diff", "create"])
def test_the_job_of_a_killed_process_is_no_obstacle_to_the_next_command(
    scene: Scene, begin: Callable[[Scene], None], command: str
) -> None:
    begin(scene)
    if command == "diff":
        scene.timeline.check(scene.domain, "c2", None, BOTH)
    else:
        scene.create("n1")
        scene.timeline.check(scene.domain, "c2", "n1", BOTH)
    assert scene.codes() <= {"leftover-bitmap"}
    assert not Path(_socket(scene)).exists()


@running
def test_a_job_of_somebody_else_is_left_alone(scene: Scene) -> None:
    path = str(scene.machine.folder / "other.sock")
    scratch = str(scene.machine.folder / "other.scratch")
    scene.machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{path}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><driver type='qcow2'/>"
        f"<scratch file='{scratch}'/></disk></disks></domainbackup>",
        None,
        0,
    )
    try:
        assert scene.codes() == set()
        assert scene.domain.repair(foreign=True) == ()
        assert listening(path)
    finally:
        scene.machine.domain.abortJob()


def test_an_intent_that_was_left_behind(scene: Scene) -> None:
    disks = tuple(CheckpointDisk(each, bitmap="c9", state=State.RECORDING) for each in sorted(BOTH))
    checkpoint = Checkpoint("c9", 1, None, EngineName.LIBVIRT, disks)
    engine = "libvirt" if scene.machine.active else "offline"
    intent = Intent("create", ("c9",), engine, {"redefinition": format_libvirt(checkpoint)})
    store = Store(scene.store).domain(scene.machine.domain.UUIDString())
    with store.lock(0):
        store.write_intent(intent)
    scene.add("vda", "c9")
    before = {each for each in bitmaps(scene.machine) if each[1] != "c9"}
    assert scene.codes() == {"intent"}
    scene.domain.repair()
    assert bitmaps(scene.machine) == before
    assert scene.codes() == set()
    scene.timeline.check_all(scene.domain, NAMES, BOTH)
