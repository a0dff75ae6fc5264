"""A revert that is refused or fails leaves the domain and its history as they were."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ckptmgr.errors import CkptmgrError, NoSnapshot, Unsupported
from integration.branch_model import Branches
from integration.evidence import unchanged

from .scene import SNAPSHOTS, bring, goes_on, releases_if_long, sound

pytestmark = SNAPSHOTS


def test_what_cannot_be_reverted_is_refused_before_the_machine_is_touched(
    scene: Branches,
) -> None:
    machine = scene.machine
    with unchanged(machine, scene.store), pytest.raises(NoSnapshot):
        scene.domain.revert_snapshot("s9")
    machine.qmp(
        "block-dirty-bitmap-add", node=machine.node("vdb"), name="somebody", persistent=True
    )
    pid = machine.pid
    with unchanged(machine, scene.store), pytest.raises(Unsupported) as caught:
        scene.domain.revert_snapshot("s1")
    assert "somebody" in str(caught.value)
    assert machine.pid == pid
    machine.qmp("block-dirty-bitmap-remove", node=machine.node("vdb"), name="somebody")
    scene.revert("s1")
    scene.scatter(6)
    sound(scene)


def _forget_internally(image: Path, name: str) -> None:
    subprocess.run(["qemu-img", "snapshot", "-d", name, str(image)], check=True)


@releases_if_long
@pytest.mark.parametrize("before", ["running", "stopped"])
@pytest.mark.parametrize("target", ["vda", "vdb"])
def test_a_revert_that_libvirt_refuses_leaves_the_present_line_going_on(
    scene: Branches, target: str, before: str
) -> None:
    """One of the images has not got the snapshot any more."""
    machine = scene.machine
    machine.stop()
    _forget_internally(machine.images[target], "s1")
    bring(machine, before)
    with pytest.raises(CkptmgrError):
        scene.domain.revert_snapshot("s1")
    listed = scene.domain.checkpoints()
    assert listed.current is not None
    if listed.current != "c2":
        # made where the machine is now, if that could be told
        scene.look()
        scene.loose = True
        scene.made(listed.current)
        assert listed.checkpoints
    scene.scatter(6)
    scene.check_all()
    if not machine.active:
        machine.start()
    goes_on(scene, "later", 8)
