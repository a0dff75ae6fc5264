"""The stand itself: what the other tests stand on is proved here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from integration.conftest import MakeMachine
from integration.first_thread import without_first_thread
from integration.stand import (
    MIB,
    Daemon,
    DiskSpec,
    Embedded,
    Machine,
    Stand,
    Workspace,
    guest,
    reap,
    rounded,
    starts,
)
from integration.stand.accel import runs
from integration.stand.patience import patiently
from integration.stand.workspace import birth
from integration.traces import holding, naming


@pytest.fixture
def parent() -> Iterator[Path]:
    """A folder with a short path, for the unix sockets in it."""
    with tempfile.TemporaryDirectory(prefix="stand-") as path:
        yield Path(path)


EVERY_KIND = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2", "raw")),
    DiskSpec("vdc", format="raw"),
    DiskSpec("vdd", compat="0.10"),
    DiskSpec("sda"),
    DiskSpec("sdb", bus="sata"),
    DiskSpec("hda"),
)


def test_writes_reach_every_kind_of_disk_paused_running_and_stopped(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(stand, EVERY_KIND)
    for disk in EVERY_KIND:
        vm.write(disk.target, MIB + 512, 1024, 0x11)
    vm.resume()
    for disk in EVERY_KIND:
        vm.write(disk.target, 2 * MIB, MIB, 0x22)
    vm.stop()
    for disk in EVERY_KIND:
        vm.write(disk.target, 4 * MIB, 512, 0x33)
        assert vm.holds(disk.target, MIB + 512, 1024, 0x11), disk
        assert vm.holds(disk.target, 2 * MIB, MIB, 0x22), disk
        assert not vm.holds(disk.target, 3 * MIB, 512, 0x22), disk
        assert vm.contents(disk.target)[4 * MIB : 4 * MIB + 513] == b"\x33" * 512 + b"\0", disk
    assert vm.writes["vda"] == [(MIB + 512, 1024), (2 * MIB, MIB), (4 * MIB, 512)]


@pytest.mark.each_release
def test_contents_of_a_running_disk_are_what_was_written(make_vm: MakeMachine) -> None:
    vm = make_vm([DiskSpec(backing=("qcow2",))])
    vm.write("vda", 5 * MIB, 70_144, 0x7E)
    expected = bytearray(64 * MIB)
    expected[5 * MIB : 5 * MIB + 70_144] = b"\x7e" * 70_144
    assert vm.contents("vda") == expected


@pytest.mark.each_release
def test_a_bitmap_of_libvirt_counts_the_granules_written(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(stand, name=f"spaces, 'quotes' & <ümläuts> {stand.kind}")
    vm.domain.checkpointCreateXML("<domaincheckpoint><name>c0</name></domaincheckpoint>")
    vm.write("vda", 65_000, 1024)
    assert vm.bitmaps("vda")["c0"]["count"] == sum(
        length for _, length in rounded(vm.writes["vda"])
    )
    vm.stop()
    assert vm.bitmaps("vda")["c0"]["flags"] == ["auto"]


def test_empty_and_read_only_drives_start(make_vm: MakeMachine) -> None:
    disks = (
        DiskSpec("hda", device="cdrom", format="raw", empty=True, read_only=True),
        DiskSpec("sda", read_only=True),
        DiskSpec("vda"),
    )
    vm = make_vm(disks)
    with pytest.raises(RuntimeError, match="write to sda"):
        vm.write("sda", 0, 512)


def test_a_killed_machine_is_shut_off_and_starts_again(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(stand)
    before = vm.pid
    vm.kill()
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF
    vm.start()
    assert vm.pid != before


def test_virsh_sees_what_this_process_sees(daemon: Daemon, make_vm_on: MakeMachine) -> None:
    vm = make_vm_on(daemon)
    assert vm.name in daemon.virsh("list", "--name").split()
    daemon.virsh("checkpoint-create-as", vm.name, "from-virsh")
    assert [each.getName() for each in vm.domain.listAllCheckpoints()] == ["from-virsh"]


def test_machines_outlive_their_daemon(daemon: Daemon, make_vm_on: MakeMachine) -> None:
    vm = make_vm_on(daemon)
    pid = vm.pid
    daemon.stop(kill=True)
    daemon.start()
    vm.domain = daemon.handle.lookupByName(vm.name)
    assert vm.active
    assert vm.pid == pid


@pytest.fixture
def hanging(
    embedded: Embedded, make_vm_on: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Machine, guest.Boot]:
    """A Linux guest that does not get anywhere, where it is known that this happens."""
    monkeypatch.setattr(guest, "may_hang", lambda domain: True)
    monkeypatch.setattr(guest, "HANGS", 0.1)
    monkeypatch.setenv(starts.FILE, str(tmp_path / "starts"))
    boot = guest.Boot.prepare(tmp_path)
    linux = {"os_elements": boot.os_elements, "devices": boot.devices, "memory": guest.MEMORY}
    return make_vm_on(embedded, **linux), boot


@pytest.mark.thorough
def test_a_guest_that_hangs_at_its_start_is_looked_at_and_started_again(
    hanging: tuple[Machine, guest.Boot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, boot = hanging

    def again() -> None:
        monkeypatch.setattr(guest, "HANGS", guest.BOOT)
        vm.domain.destroy()
        vm.start(paused=False)

    shell = guest.come_up(boot, vm.domain, again, name=vm.name)
    shell.write("vda", MIB, 4096, 0x5A)
    shell.close()
    # one that runs already does not say that it is ready: it is asked
    shell = guest.Shell(boot)
    shell.write("vda", 2 * MIB, 4096, 0x5A)
    shell.close()
    assert vm.holds("vda", MIB, 4096, 0x5A)
    assert vm.holds("vda", 2 * MIB, 4096, 0x5A)
    first, second = starts.read(tmp_path / "starts")
    assert "VM status: paused" in first.hung
    assert first.hung.count("EIP=0000fff0") == 2
    assert not second.hung
    said = starts.lines([first, second])
    assert said[0].startswith("2 starts, ")
    assert said[0].endswith("; 1 of them hung")


def test_a_guest_that_hangs_every_time_is_given_up_with_what_it_was_seen_doing(
    hanging: tuple[Machine, guest.Boot], tmp_path: Path
) -> None:
    vm, boot = hanging
    tries: list[None] = []
    with pytest.raises(TimeoutError, match=r"start 3 of 3; seen:\nVM status: paused") as failure:
        guest.come_up(boot, vm.domain, lambda: tries.append(None), name=vm.name)
    assert len(tries) == guest.STARTS - 1
    assert "IP=0000fff0" in str(failure.value)
    assert all(start.hung for start in starts.read(tmp_path / "starts"))


def test_rounded_merges_and_clips() -> None:
    assert rounded([(65_535, 2), (200_000, 1), (131_072, 1)], 65536, 200_001) == [(0, 200_001)]
    assert rounded([(0, 1), (131_072, 65_536)], 65536, MIB) == [(0, 65_536), (131_072, 65_536)]
    assert rounded([]) == []


def test_the_accelerator_trial_tells_a_guest_that_runs_from_one_that_does_not() -> None:
    assert runs("tcg", seconds=patiently(30))
    assert not runs("tcg", seconds=0.01)
    assert not runs("no-such-accelerator", seconds=5)


def test_a_run_that_was_killed_is_cleared_away_by_the_next(parent: Path) -> None:
    """SIGKILL in the middle of a test, with a machine running; its guard is killed, too."""
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from integration.stand import Embedded, Machine, Workspace
        machine = Machine(Embedded(Workspace(Path({str(parent)!r}), guarded=False)))
        print(machine.pid, flush=True)
        time.sleep(60)
        """
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        machine = int(run.stdout.readline())
        assert reap(parent) == []  # it is alive: not ours to touch
        assert birth(machine) is not None
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    (workspace,) = parent.iterdir()
    (workspace / "processes").unlink()  # killed before it could be noted down
    assert reap(parent) == [workspace]
    assert birth(machine) is None
    assert list(parent.iterdir()) == []


def test_a_process_has_not_ended_before_its_last_thread() -> None:
    """A server that is killed has its image locked until then."""
    with without_first_thread() as process:
        assert birth(process) is not None
    assert birth(process) is None


@pytest.mark.parametrize("kind", ["Embedded", "Daemon"])
def test_nothing_is_left_when_all_processes_of_a_run_are_killed(kind: str, parent: Path) -> None:
    """SIGKILL for the whole process group: no process, mount or socket, without a next run."""
    program = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        from integration.stand import Daemon, Embedded, Machine, Workspace, private_mounts
        if {kind!r} == "Daemon" and os.geteuid() == 0:
            private_mounts()
        stand = {kind}(Workspace(Path({str(parent)!r})))
        print(Machine(stand).pid, stand.uri, flush=True)
        time.sleep(60)
        """
    )
    command = [sys.executable, "-c", program]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout is not None
        machine = int(run.stdout.readline().split()[0])
        (workspace,) = parent.iterdir()
        mounts = Path(f"/proc/{run.pid}/ns/mnt").readlink()
        assert machine in naming(workspace)
        assert list(workspace.rglob("*.sock")) or list(workspace.rglob("libvirt-sock"))
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    deadline = time.monotonic() + patiently(60)
    # a process that ends has no command line any more when it closes its sockets
    while left := [
        *parent.iterdir(),
        *naming(workspace),
        *holding(mounts),
        *(
            line
            for line in Path("/proc/net/unix").read_text().splitlines()
            if str(workspace) in line
        ),
    ]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)
    assert str(workspace) not in Path("/proc/self/mountinfo").read_text()


def test_a_process_with_a_recycled_id_is_left_alone(parent: Path) -> None:
    with Workspace(parent) as workspace:
        (workspace.path / "processes").write_text(f"{os.getpid()} 1\n")
        assert workspace.running() == []
    assert not workspace.path.exists()


def test_what_a_test_left_running_is_ended_with_the_workspace(parent: Path) -> None:
    with Workspace(parent) as workspace:
        process = subprocess.Popen(["sleep", "60"])
        workspace.record(process.pid)
        assert workspace.running() == [process.pid]
    assert process.wait(5) == -signal.SIGKILL


def test_nobody_else_can_use_an_embedded_root(embedded: Embedded) -> None:
    """Why there is a daemon stand: the driver's root is locked until its process ends."""
    command = ["virsh", "-c", embedded.uri, "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "driver.pid" in done.stderr
