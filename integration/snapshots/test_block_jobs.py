"""Block jobs of others between a snapshot and its revert: nothing that changed is called clean."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import libvirt
import pytest

from ckptmgr.errors import Busy, Unsupported
from integration import block_jobs
from integration.branch_model import Branches
from integration.evidence import unchanged
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Machine, await_greeting

from .scene import SNAPSHOTS, MakeBranches, goes_on, may_load, releases_if_long, repaired, sound

pytestmark = SNAPSHOTS

JOBS: dict[str, Callable[[Machine, str], object]] = {
    "commit": block_jobs.commit,
    "pull": block_jobs.pull,
    "copy": block_jobs.copy,
}


def after_job(scene: Branches, job: str, *, resized: bool = False) -> None:
    """A block job is done.  libvirt 7.0 knows nothing of bitmaps, and takes none to a copy; the
    others lose some when the disk was resized.
    """
    scene.find()
    gone = not scene.recorded()
    assert resized or gone == (job == "copy" and scene.machine.stand.kind == "debian11")
    if gone or resized:
        scene.lose()


@pytest.mark.parametrize(
    "resized",
    [
        pytest.param(False, id=""),
        pytest.param(True, id="after a resize", marks=[releases_if_long, pytest.mark.thorough]),
    ],
)
@pytest.mark.parametrize("job", JOBS)
def test_an_external_snapshot_and_a_block_job_of_others(
    scene: Branches, job: str, resized: bool, cell: Cell
) -> None:
    machine = scene.machine
    block_jobs.overlay(machine)
    scene.find()
    scene.scatter(6)
    scene.check_all()
    scene.create("c3")
    scene.scatter(7)
    scene.loose = True  # a job copies, and where it copies to is marked
    if resized:
        machine.domain.blockResize("vda", 6 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        scene.now["vda"].extend(bytes(2 * MIB - 1536))
        scene.write("vda", 5 * MIB, 70_000)
        scene.lose()
    JOBS[job](machine, "vda")
    after_job(scene, job, resized=resized)
    scene.scatter(8)
    scene.check_all()
    repaired(scene)
    goes_on(scene, "later", 9)
    if job != "commit" and not resized:
        # the snapshots are in images that have left the chain
        may_load(scene, "s1", cell)
        scene.revert("s1")
        scene.scatter(11)
        sound(scene)


def test_fact_23_changes_are_not_called_clean(make: MakeBranches) -> None:
    """Snapshot, resize, blockpull: libvirt's increment is all clean then."""
    scene = make((DiskSpec("vda", size=4 * MIB),))
    scene.create("c1")
    scene.write("vda", 0, 2 * MIB)
    block_jobs.overlay(scene.machine)
    scene.find()
    machine = scene.machine
    machine.domain.blockResize("vda", 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    scene.now["vda"].extend(bytes(4 * MIB))
    block_jobs.pull(machine, "vda")
    scene.lose()
    scene.check_all()
    scene.snapshot("s1")
    scene.write("vda", 7 * MIB, 65536)
    made = scene.revert("s1")
    scene.check_all()
    scene.write("vda", 6 * MIB, 65536)
    scene.check("c1", made.name)
    scene.check(made.name, None)
    repaired(scene)


@releases_if_long
def test_the_disk_grows_before_a_snapshot(make: MakeBranches) -> None:
    """What came to the disk is a part of what changed since."""
    scene = make((DiskSpec("vda", size=4 * MIB),))
    scene.create("c1")
    scene.write("vda", 0, 65536)
    machine = scene.machine
    machine.domain.blockResize("vda", 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    scene.now["vda"].extend(bytes(4 * MIB))
    scene.loose = True
    scene.snapshot("s1")
    scene.write("vda", 5 * MIB, 65536)
    made = scene.revert("s1")
    scene.check("c1", made.name)
    scene.check_all()


@releases_if_long
def test_a_revert_from_an_overlay_to_a_snapshot_in_its_base(scene: Branches, cell: Cell) -> None:
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)
    goes_on(scene, "later", 9)


@releases_if_long
def test_a_snapshot_whose_base_was_written_since_is_refused(scene: Branches, cell: Cell) -> None:
    """What it stands on is not what it was."""
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(6)
    scene.snapshot("s3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    for made in ("c4", ""):
        scene.scatter(8)
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported, match="stands on"):
            scene.domain.revert_snapshot("s3")
        if made:
            # also when the base is below another one, and cannot be written any more
            scene.create(made)
            block_jobs.overlay(scene.machine)
            scene.find()
    sound(scene)


def test_a_revert_to_an_image_that_has_left_the_chain(scene: Branches, cell: Cell) -> None:
    """Its bitmaps are still in it, and QEMU would not revert it: they are ours, and go."""
    for target in scene.targets:
        block_jobs.copy(scene.machine, target)
    after_job(scene, "copy")
    scene.scatter(6)
    scene.create("c3")
    scene.scatter(7)
    may_load(scene, "s1", cell)
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)
    goes_on(scene, "later", 9)


@releases_if_long
def test_an_image_that_has_left_the_chain_with_a_bitmap_of_others_is_refused(
    scene: Branches, cell: Cell
) -> None:
    old = scene.machine.images["vda"]
    block_jobs.copy(scene.machine, "vda")
    scene.find()
    may_load(scene, "s1", cell)
    for name, reason in (("somebody", "not ours"), ("c3", "not ours")):
        subprocess.run(["qemu-img", "bitmap", "--add", str(old), name], check=True)
        with unchanged(scene.machine, scene.store), pytest.raises(Unsupported, match=reason):
            scene.domain.revert_snapshot("s1")
        subprocess.run(["qemu-img", "bitmap", "--remove", str(old), name], check=True)
    with subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(old.with_suffix(".sock")), str(old)]
    ) as server:
        await_greeting(old.with_suffix(".sock"), server)
        with unchanged(scene.machine, scene.store), pytest.raises(Busy):
            scene.domain.revert_snapshot("s1")
        server.kill()
    scene.revert("s1")
    scene.scatter(8)
    sound(scene)
