"""The hook: a plain ``virsh snapshot-revert`` succeeds, branches, and loses nothing kept so far."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from ckptmgr.hook.installation import install, setting, status, uninstall
from ckptmgr.hook.script import STOPPED
from ckptmgr.store import Store
from integration import block_jobs
from integration.branch_model import Branches
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, known
from integration.stand import MIB, Daemon, DiskSpec
from integration.stand.patience import patiently

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's libvirt runs hooks")

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=4 * MIB, backing=("qcow2",)))
HOOKS = Path("/etc/libvirt/hooks")  # the stand's own


def reload(daemon: Daemon) -> None:
    """What ``systemctl reload libvirtd`` does: it looks which hooks there are.

    It has when it calls its own (virHookCall of virhook.c), which is there for that time.
    """
    own, called = HOOKS / "daemon", HOOKS / "reloaded"
    own.write_text(f'#!/bin/sh\n[ "$2" = reload ] && : >"{called}"\n')
    own.chmod(0o755)
    os.kill(daemon.pid, signal.SIGHUP)
    deadline = time.monotonic() + patiently(60)
    while not called.exists():
        assert time.monotonic() < deadline, "libvirtd does not look for hooks"
        time.sleep(0.02)
    own.unlink()
    called.unlink()


@pytest.fixture
def scene(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> Iterator[Branches]:
    """A machine that runs under a libvirt with the hook, and a hook of somebody else's."""
    other = HOOKS / "qemu.d/other"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text(f'#!/bin/sh\necho "$2 $3" >> "{tmp_path}/other.log"\n')
    other.chmod(0o755)
    install(HOOKS, setting(tmp_path / "store"))
    reload(daemon)
    machine = make_vm_on(daemon, DISKS, state="running")
    try:
        yield Branches(machine, tmp_path / "store")
    finally:
        machine.destroy()
        uninstall(HOOKS)
        other.unlink()
        reload(daemon)


def virsh_revert(scene: Branches, name: str) -> None:
    """A revert by somebody who knows nothing of checkpoints; it must succeed."""
    scene.machine.domain.revertToSnapshot(scene.machine.domain.snapshotLookupByName(name), 0)
    scene.moved()


def sound(scene: Branches) -> None:
    scene.require_tree()
    scene.check_all()
    found = [each for each in scene.domain.check() if not each.harmless]
    assert not found, [each.message for each in found]
    assert set(known(scene.machine)) == {name for _, name in bitmaps(scene.machine)}


def test_a_plain_revert_runs_on_and_branches(scene: Branches, tmp_path: Path) -> None:
    scene.begin()
    virsh_revert(scene, "s1")
    assert scene.state() == "running"
    assert bitmaps(scene.machine) == set()
    (finding,) = [each for each in scene.domain.check() if not each.harmless]
    assert (finding.code, finding.checkpoint) == ("reverted", "c1")
    assert "the line up to c2 was kept" in finding.message
    scene.scatter(6)
    scene.create("c3")
    assert scene.domain.parent("c3").name == "c1"
    scene.scatter(7)
    scene.create("c4")
    assert scene.between("c3", "c4")[1] is False
    sound(scene)
    assert "prepare begin" in (tmp_path / "other.log").read_text()


def test_what_was_written_until_the_revert_is_kept(scene: Branches) -> None:
    """So a later revert of ours, to a snapshot on the line that was left, is exact."""
    scene.begin()
    virsh_revert(scene, "s1")
    made = scene.revert("s2")
    difference = scene.domain.diff("c2", made.name)
    assert all(disk.known for disk in difference.disks)
    sound(scene)


def test_a_revert_without_a_checkpoint_since_is_noticed_too(scene: Branches) -> None:
    """The marker says nothing then: it is the same."""
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.scatter(2)
    virsh_revert(scene, "s1")
    assert scene.state() == "running"
    assert [each.code for each in scene.domain.check() if not each.harmless] == ["reverted"]
    scene.scatter(3)
    scene.create("c2")
    scene.check_all()
    sound(scene)


def test_a_machine_that_was_off_reverts_too(scene: Branches) -> None:
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    scene.scatter(2)
    scene.machine.stop()
    virsh_revert(scene, "s1")
    assert scene.state() == "running"
    scene.scatter(3)
    scene.create("c2")
    sound(scene)


def test_a_machine_that_was_off_reverts_where_its_definition_tells_its_backing_chains(
    scene: Branches,
) -> None:
    """As libvirt writes it when another tool takes an external snapshot."""
    scene.create("c1")
    scene.scatter(1)
    scene.snapshot("s1")
    block_jobs.overlay(scene.machine)
    scene.find()
    scene.scatter(2)
    scene.snapshot("s2")
    scene.scatter(3)
    for number, name in enumerate(("s2", "s1"), 4):
        recording = bitmaps(scene.machine)
        scene.machine.stop()
        scene.machine.start()
        assert bitmaps(scene.machine) == recording != set()
        scene.machine.stop()
        assert b"<backingStore" in Path(f"/etc/libvirt/qemu/{scene.machine.name}.xml").read_bytes()
        virsh_revert(scene, name)
        assert scene.state() == "running"
        scene.scatter(number)
        scene.create(f"c{number}")
        sound(scene)


def test_reverts_on_end_with_no_command_between(scene: Branches) -> None:
    scene.begin()
    for number, name in enumerate(("s1", "s2", "s2", "s1"), 6):
        virsh_revert(scene, name)
        scene.scatter(number)
    scene.create("c3")
    sound(scene)
    made = scene.revert("s2")
    scene.scatter(20)
    assert made.parent == "c2"
    sound(scene)


def test_repair_takes_a_revert_in_as_well(scene: Branches) -> None:
    scene.begin()
    virsh_revert(scene, "s1")
    assert [each.code for each in scene.domain.repair()] == ["reverted"]
    current = scene.domain.current()
    assert current is not None
    assert current.name == "c1"
    scene.create("c3")
    sound(scene)


def test_ordinary_starts_and_restores_change_nothing(scene: Branches) -> None:
    scene.begin()
    folder = Store(scene.store).domain(scene.machine.domain.UUIDString()).path
    before = {path.name: path.read_bytes() for path in folder.glob("[!.]*.*")}
    scene.machine.stop()
    scene.machine.start()
    scene.machine.resume()
    with contextlib.suppress(libvirt.libvirtError):
        scene.machine.domain.managedSave(0)
    if not scene.machine.active:
        scene.machine.start(paused=False)
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*.*")} == before
    scene.look()
    sound(scene)
    assert scene.between("c2", None)[1] is False


def test_our_own_reverts_are_left_alone(scene: Branches) -> None:
    scene.begin()
    made = scene.revert("s1")
    assert scene.between("c1", made.name)[1] is False
    sound(scene)


def test_our_own_revert_to_a_state_that_was_off_is_over_at_the_next_start(scene: Branches) -> None:
    """libvirt ends the QEMU that runs, as for a revert that goes on, and starts none."""
    scene.machine.stop()
    scene.snapshot("off")
    scene.machine.start()
    scene.find()
    scene.scatter(1)
    scene.create("c1")
    scene.scatter(2)
    made = scene.revert("off")
    assert scene.state() == "stopped"
    scene.scatter(3)
    recording = bitmaps(scene.machine)
    scene.machine.start()
    scene.find()
    assert bitmaps(scene.machine) == recording != set()
    scene.scatter(4)
    assert scene.between(made.name, None)[1] is False
    sound(scene)


def test_without_the_hook_the_same_revert_ends_the_machine(scene: Branches, daemon: Daemon) -> None:
    scene.begin()
    uninstall(HOOKS)
    with pytest.raises(libvirt.libvirtError):
        virsh_revert(scene, "s1")
    assert not scene.machine.active
    assert not status(HOOKS, setting(scene.store)).installed
    scene.start()
    scene.moved()
    scene.check_all()
    scene.domain.repair()
    scene.create("c3")
    sound(scene)


def test_the_hook_costs_an_ordinary_start_little(
    scene: Branches, capsys: pytest.CaptureFixture[str]
) -> None:
    """By turns, in one run; it is some 20 ms, libvirt's own start a second."""
    scene.create("c1")
    note = Store(scene.store).domain(scene.machine.domain.UUIDString()).path / STOPPED
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        installed = turn % 2 == 0
        install(HOOKS, setting(scene.store)) if installed else uninstall(HOOKS)
        note.unlink(missing_ok=True)
        scene.machine.stop()
        begin = time.monotonic()
        scene.machine.start()
        seconds[installed].append(time.monotonic() - begin)
        assert note.exists() == installed, "the hook was not called, or is called still"
    plain, cost = (statistics.median(seconds[each]) for each in (False, True))
    with capsys.disabled():
        print(
            f"\na start without the hook {plain * 1000:.0f} ms, "
            f"with it {(cost - plain) * 1000:+.0f} ms"
        )
