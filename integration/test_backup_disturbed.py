"""A backup that is disturbed in the middle: by a signal, by the end of the domain, by others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr
from ckptmgr.backup.manifest import Manifest
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.errors import OperationFailed
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, everything, known
from integration.stand import MIB, Daemon, DiskSpec
from integration.stand.patience import patiently
from integration.test_backup import Backups, disk_in

DISKS = (DiskSpec("vda", size=16 * MIB), DiskSpec("vdb", size=8 * MIB))
SLOW = MIB // 4
"""Bytes a second: a minute and a half for these disks, of which no test waits for the end."""


class Disturbed(Backups):
    """A machine with one point, `first`, and plenty that changed since."""

    def begin(self) -> None:
        self.scatter(1)
        self.first = self.take("first")
        self.dirty()
        self.folder = self.store.parent

    def dirty(self) -> None:
        """Write all over the disks."""
        for number, disk in enumerate(self.machine.disks):
            self.machine.write(disk.target, 0, disk.size, 0x31 + number)

    def begun(self, *options: str, program: Sequence[str] = ()) -> subprocess.Popen[str]:
        """A process that makes a backup called ``second``.

        program -- in the place of ckptmgr
        """
        ours = CommandLine(self.machine.stand, self.store)  # type: ignore[arg-type]
        engine = [] if self.engine == "auto" else ["--engine", self.engine]
        words = ["backup", self.machine.name, str(self.repository), "second", *options]
        return ours.start(*engine, *words, program=program)

    @contextlib.contextmanager
    def copying(self) -> Iterator[subprocess.Popen[str]]:
        """A process that is in the middle of a slow backup."""
        with ended(self.begun("--limit", str(SLOW))) as process:
            until(lambda: self.copied() > MIB // 4 or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            yield process

    @contextlib.contextmanager
    def stopped(self) -> Iterator[subprocess.Popen[str]]:
        """A process that has been stopped in the middle of a backup, and goes on with SIGCONT."""
        with ended(self.begun(program=["-c", STOPPED])) as process:
            until(lambda: state(process.pid) in "TZ")
            assert process.poll() is None, process.communicate()
            yield process

    def copied(self) -> int:
        """Bytes in images of points that are being made."""
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in self.repository.glob("*/.*.partial/*.qcow2"))
        return 0

    def leftovers(self) -> list[object]:
        """What no backup may leave behind."""
        left: list[object] = list(self.repository.glob("*/.*"))
        left += self.store.rglob("intent.json")
        if self.machine.active:
            if self.machine.domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                left.append("job")
            left += self.machine.qmp("query-block-exports")
            left += self.machine.qmp("query-jobs")
            with self.domain() as domain:
                folder = domain.adapter.runtime_directory()
                left += [path for path in folder.iterdir() if "ckptmgr" in path.name]
        return left

    def goes_on(self, *, reason: bool = False) -> Manifest:
        """The next backup is right, and everything fits; reason: an interval may be unknown."""
        if not self.machine.active and self.engine != "offline":
            self.machine.start(paused=False)
        self.scatter(7)
        third = self.take("third")
        self.check(self.first, third)
        assert third.parent == "first"
        assert [disk.mode for disk in third.disks] == ["incremental"] * len(third.disks)
        if not reason:
            assert [disk.reason for disk in third.disks] == [None] * len(third.disks)
        assert self.leftovers() == []
        listing = ckptmgr.repository(self.repository).points()
        assert [point.name for point in listing.points] == ["first", "third"]
        assert not listing.damaged
        assert ckptmgr.repository(self.repository).verify().findings == ()
        with self.domain() as domain:
            assert reason or [each.code for each in domain.check() if not each.harmless] == []
        return third


STOPPED = """
import os, signal, sys
from ckptmgr.cli import main
from ckptmgr.operation.point import RestorePoint

advance = RestorePoint._advance


def stopping(point, target, blocks, size):
    def and_stop(length):
        done(length)
        if target == "vda" and not stopped:
            stopped.append(length)
            os.kill(os.getpid(), signal.SIGSTOP)

    done, stopped = advance(point, target, blocks, size), []
    return and_stop


RestorePoint._advance = stopping
sys.exit(main())
"""
"""ckptmgr, which stops when a part of vda was copied."""


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, which does not outlive the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def state(pid: int) -> str:
    """What a process that has not been waited for does, as a letter: T, it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + patiently(60)
    while not done():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


MakeDisturbed = Callable[..., Disturbed]


@pytest.fixture
def disturbed(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> MakeDisturbed:
    def make(engine: str = "libvirt", **options: Any) -> Disturbed:
        state = "stopped" if engine == "offline" else "running"
        made = Disturbed(make_vm_on(daemon, DISKS, state=state, **options), tmp_path)
        made.engine = engine
        made.begin()
        return made

    return make


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["libvirt", "monitor", "offline"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_nothing_is_left(
    engine: str, number: int, status: int, disturbed: MakeDisturbed
) -> None:
    vm = disturbed(engine)
    before = everything(vm.machine, vm.store)
    with vm.copying() as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=patiently(60))
        assert process.returncode == status, said
        assert "Traceback" not in said
    after = everything(vm.machine, vm.store)
    assert after == before
    assert vm.leftovers() == []
    vm.goes_on()


# --- the domain ---------------------------------------------------------------------------------


def _destroy(vm: Disturbed) -> None:
    vm.machine.domain.destroy()


def _stop(vm: Disturbed) -> None:
    vm.machine.stop()


def _kill_qemu(vm: Disturbed) -> None:
    vm.machine.kill()


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
@pytest.mark.parametrize("how", [_destroy, _stop, _kill_qemu])
def test_the_domain_ends_in_the_middle(
    engine: str, how: Callable[[Disturbed], None], disturbed: MakeDisturbed
) -> None:
    vm = disturbed(engine)
    with vm.copying() as process:
        how(vm)
        _, said = process.communicate(timeout=patiently(120))
        assert process.returncode == 1, said
        assert "Traceback" not in said
        (message,) = [line for line in said.splitlines() if line.startswith("ckptmgr: error: ")]
        assert vm.machine.name in message
        assert "vda" in message
    vm.goes_on(reason=True)


def test_a_domain_that_ends_just_before_its_job_is_not_called_unsupported(
    disturbed: MakeDisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = disturbed()
    look = LibvirtEngine._job_running

    def and_end(engine: LibvirtEngine) -> bool:
        running = look(engine)
        vm.machine.domain.destroy()
        return running

    with monkeypatch.context() as patch, vm.domain() as domain:
        patch.setattr(LibvirtEngine, "_job_running", and_end)
        with pytest.raises(OperationFailed, match="ended before the backup job began"):
            domain.backup(vm.repository, "second")
    vm.goes_on(reason=True)


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_libvirtd_is_killed_in_the_middle(
    engine: str, disturbed: MakeDisturbed, daemon: Daemon
) -> None:
    """The copy goes on, since QEMU does; then there is nobody to end the job, and it is said."""
    vm = disturbed(engine)
    with vm.stopped() as process:
        daemon.stop(kill=True)
        try:
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate(timeout=patiently(120))
        finally:
            daemon.start()
            vm.machine.domain = daemon.handle.lookupByName(vm.machine.name)
        assert process.returncode == 1, said
        assert "is running" in said
        assert "Traceback" not in said
    vm.goes_on()


def test_the_domain_is_not_migrated_meanwhile(disturbed: MakeDisturbed, tmp_path: Path) -> None:
    """libvirt waits half a minute, and then refuses; the backup is not disturbed."""
    vm = disturbed()
    with vm.copying() as process:
        destination = f"qemu+unix:///system?socket={tmp_path}/nobody"
        flags = (
            libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_UNSAFE
        )
        with pytest.raises(libvirt.libvirtError) as refused:
            vm.machine.domain.migrateToURI3(destination, {}, flags)
        assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=patiently(60))
    vm.goes_on()


# --- others -------------------------------------------------------------------------------------


def test_others_wait_or_are_told_that_it_is_busy(disturbed: MakeDisturbed, tmp_path: Path) -> None:
    vm = disturbed()
    settings = tmp_path / "ckptmgr.toml"
    settings.write_text("lock_timeout = 0.5\n")
    ours = CommandLine(vm.machine.stand, vm.store, settings=settings)  # type: ignore[arg-type]
    name = vm.machine.name
    with vm.copying() as process:
        for words in (
            ("backup", name, vm.repository),
            ("backup", name, tmp_path / "elsewhere"),
            ("create", name),
            ("diff", name, "first"),
        ):
            ran = ours("--json", *words)
            assert ran.status == 5, (words, ran.err)
            assert ran.json["error"]["code"] == "busy"
        assert ours("points", vm.repository).status == 0
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=patiently(60))
    vm.goes_on()


def test_two_backups_at_once_come_one_after_the_other(
    disturbed: MakeDisturbed, tmp_path: Path
) -> None:
    vm = disturbed()
    settings = tmp_path / "ckptmgr.toml"
    settings.write_text("lock_timeout = 300\n")
    ours = CommandLine(vm.machine.stand, vm.store, settings=settings)  # type: ignore[arg-type]
    name = vm.machine.name
    held = vm.contents()
    repositories = [vm.repository, vm.repository, tmp_path / "other"]
    running = [
        ours.start("backup", name, str(repository), f"p{number}")
        for number, repository in enumerate(repositories)
    ]
    for process in running:
        _, said = process.communicate(timeout=patiently(150))
        assert process.returncode == 0, said
    line = {
        point.name: point
        for repository in {*repositories}
        for point in ckptmgr.repository(repository).points().points
    }
    assert set(line) == {"first", "p0", "p1", "p2"}
    for number, repository in enumerate(repositories):
        lineage = repository / vm.machine.domain.UUIDString()
        manifest = json.loads((lineage / f"p{number}" / "manifest.json").read_text())
        assert {disk["mode"] for disk in manifest["disks"]} <= {"incremental", "full"}
        for target, data in held.items():
            assert disk_in(lineage / f"p{number}" / f"{target}.qcow2") == data
    assert vm.leftovers() == []


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_a_backup_of_somebody_elses_is_not_touched(
    engine: str, disturbed: MakeDisturbed, tmp_path: Path
) -> None:
    vm = disturbed(engine)
    folder = vm.machine.folder
    theirs = f"""
<domainbackup mode='pull'>
  <server transport='unix' socket='{folder}/theirs.sock'/>
  <disks>
    <disk name='vda' backup='yes' type='file'><scratch file='{folder}/theirs.scratch'/></disk>
    <disk name='vdb' backup='no'/>
  </disks>
</domainbackup>"""
    before = bitmaps(vm.machine), known(vm.machine)
    vm.machine.domain.backupBegin(theirs, None)
    job = vm.machine.domain.backupGetXMLDesc()
    with pytest.raises(ckptmgr.Busy) as caught:
        vm.take("second")
    assert vm.machine.name in caught.value.message
    assert vm.machine.domain.backupGetXMLDesc() == job
    assert os.path.exists(f"{folder}/theirs.sock")  # noqa: PTH110 -- a socket
    assert not list(vm.repository.glob("*/.*"))
    vm.machine.domain.abortJob()
    until(lambda: vm.machine.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
    assert (bitmaps(vm.machine), known(vm.machine)) == before
    vm.goes_on()
