"""What the tests of snapshots share: the disks, and what must be right after each revert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import libvirt
import pytest

from ckptmgr.errors import Unsupported
from integration.branch_model import Branches
from integration.evidence import bitmaps, known, unchanged
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Machine

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=4 * MIB, backing=("qcow2",)))

MakeBranches = Callable[..., Branches]

SNAPSHOTS = [
    pytest.mark.once,
    pytest.mark.releases(("debian11", "monitor"), ("debian13", "libvirt")),
]
"""Where the tests of snapshots are run: they last, and the oldest and the newest show most."""

releases_if_long = pytest.mark.releases()
"""For a test that is run on the other releases with --long alone: what it shows does not depend on
them, or is a part of what the random histories do there.
"""


def sound(scene: Branches) -> None:
    """Everything there is to be seen."""
    scene.require_tree()
    scene.check_all()
    found = [each for each in scene.domain.check() if not each.harmless]
    assert not found, [each.message for each in found]
    if scene.machine.active and scene.engine == "libvirt":
        # what libvirt leaves behind where a block job's merge of bitmaps failed
        shown = {name for _, name in bitmaps(scene.machine)} - {"libvirt-tmp-activewrite"}
        assert set(known(scene.machine)) == shown


def repaired(scene: Branches) -> None:
    """After others have been at work: whatever they did is curable, and nothing is left out."""
    scene.check_all()
    scene.domain.repair()
    sound(scene)


def goes_on(scene: Branches, name: str, number: int) -> None:
    """The next checkpoint is exact again."""
    scene.create(f"{name}-a")
    scene.scatter(number)
    scene.create(f"{name}-b")
    assert scene.between(f"{name}-a", f"{name}-b")[1] is False
    scene.scatter(number + 1)
    sound(scene)


def in_place(scene: Branches) -> bool:
    """Whether libvirt loads a snapshot into the QEMU that runs (before 8.0)."""
    return bool(scene.machine.stand.handle.getLibVersion() < 8_000_000)


def unnamed(scene: Branches, message: str) -> str:
    """An error's message, which is the same for every domain."""
    return message.replace(f"domain {scene.machine.name!r}", "the domain")


def may_load(scene: Branches, name: str, cell: Cell) -> None:
    """The machine has other images than at the snapshot: where libvirt would load it into the QEMU
    that has them, this is refused until the machine is stopped.
    """
    if in_place(scene):
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported) as caught:
            scene.domain.revert_snapshot(name)
        assert "stop the domain" in str(caught.value.hint)
        cell.refused(f"to revert to when a domain that runs had other images: {caught.value.hint}")
        scene.machine.stop()


def bring(machine: Machine, state: str) -> None:
    """Have it running, paused or stopped."""
    if machine.active and state == "stopped":
        machine.stop()
    if not machine.active and state != "stopped":
        machine.start()
    if state == "running":
        with contextlib.suppress(libvirt.libvirtError):  # it runs already
            machine.resume()
    elif state == "paused" and machine.domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
        machine.domain.suspend()
