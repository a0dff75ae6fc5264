"""Several processes on one domain: one after the other, or busy."""

from __future__ import annotations

import fcntl
import os
from itertools import pairwise
from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.cli.program import run
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, domain_of, known, on_tops, unchanged
from integration.stand import MIB, Daemon, DiskSpec, Embedded

DISKS = (DiskSpec("vda", size=MIB), DiskSpec("vdb", size=MIB))
LONG = 300


def patient(daemon: Daemon, folder: Path) -> CommandLine:
    """The command line, whose processes wait for each other however slow the machine is."""
    settings = folder / "ckptmgr.toml"
    settings.write_text(f"lock_timeout = {LONG}\n")
    return CommandLine(daemon, folder / "store", settings=settings)


def test_creates_at_once_come_one_after_the_other(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine, ours = make_vm_on(daemon, DISKS), patient(daemon, tmp_path)
    domain = domain_of(machine, tmp_path / "store")
    domain.create("c0")
    machine.write("vda", 0, 1)
    running = [ours.start("create", machine.name, name) for name in ("a", "b", "c")]
    for process in running:
        _, said = process.communicate(timeout=LONG)
        assert process.returncode == 0, said
    line = [view.name for view in domain.checkpoints(topological=True).checkpoints]
    assert sorted(line) == ["a", "b", "c", "c0"]
    assert known(machine) == dict(zip(line, (None, *line), strict=False))
    assert domain.checkpoints().current == line[-1]
    assert bitmaps(machine) == on_tops(machine, {"vda", "vdb"}, *line)
    first = domain.diff("c0", line[1])
    assert [disk.extents() for disk in first.disks] == [[(0, 65536)], []]
    for start, end in pairwise(line[1:]):
        assert [disk.extents() for disk in domain.diff(start, end).disks] == [[], []]


def test_of_two_creates_of_one_name_one_is_told_that_it_is_taken(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    machine, ours = make_vm_on(daemon, DISKS), patient(daemon, tmp_path)
    running = [ours.start("--json", "create", machine.name, "same") for _ in range(2)]
    ends = sorted((process.communicate(timeout=LONG)[0], process.returncode) for process in running)
    assert sorted(status for _, status in ends) == [0, 1]
    assert any("checkpoint-exists" in said for said, status in ends if status == 1)
    assert bitmaps(machine) == on_tops(machine, {"vda", "vdb"}, "same")


def test_a_lock_that_is_held_is_waited_for_and_then_busy(
    embedded: Embedded,
    make_vm: MakeMachine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = make_vm(DISKS)
    domain = domain_of(machine, tmp_path, lock_timeout=0.2)
    domain.create("c0")
    settings = embedded.root / "etc" / "ckptmgr.toml"
    settings.write_text("lock_timeout = 0.2\n")
    lock = os.open(tmp_path / domain.view.uuid / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with unchanged(machine, tmp_path):
            for change in (
                lambda: domain.create("c1"),
                lambda: domain.delete("c0"),
                lambda: domain.diff("c0"),
                domain.adopt,
            ):
                with pytest.raises(ckptmgr.Busy):
                    change()
            assert domain.checkpoints().current == "c0"  # reading needs no lock
            capsys.readouterr()
            words = ["-c", embedded.uri, "--store", str(tmp_path), "--json"]
            assert run([*words, "create", machine.name, "c1"]) == 5
            assert '"code": "busy"' in capsys.readouterr().out
    finally:
        os.close(lock)
        settings.unlink()
    domain.create("c1")


def test_a_job_of_someone_else_is_busy_and_left_alone(make_vm: MakeMachine, tmp_path: Path) -> None:
    machine = make_vm(DISKS)
    domain = domain_of(machine, tmp_path)
    domain.create("c0")
    socket, scratch = machine.folder / "s", machine.folder / "scratch"
    machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>",
        None,
        0,
    )
    try:
        with unchanged(machine, tmp_path):
            with pytest.raises(ckptmgr.Busy):
                domain.create("c1")
            with pytest.raises(ckptmgr.Busy):
                domain.diff("c0")
    finally:
        machine.domain.abortJob()
