"""A stack ends with what started it, and leaves no trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from integration.stacks import RELEASES, Stack, build
from integration.stacks.__main__ import NAMES
from integration.stacks.fixtures import Stacks
from integration.stacks.table import Cell
from integration.stand.accel import domain_type
from integration.traces import holding, naming


@pytest.mark.scenario("one path inside and out, no /dev/kvm that does not work")
def test_a_stack_has_our_folders_where_we_have_them_and_leaves_its_release_alone(
    stack: Stack, tmp_path: Path
) -> None:
    def inside(*command: str) -> bool:
        return subprocess.run(stack.inside(*command), check=False).returncode == 0

    (tmp_path / "out").touch()
    assert inside("mv", f"{tmp_path}/out", f"{tmp_path}/in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert inside("test", "-e", "/dev/kvm") == (domain_type() == "kvm")
    assert inside("touch", "/usr/written")
    assert not (build(stack.kind) / "usr/written").exists()


@pytest.mark.scenario("killed, it leaves no trace")
def test_a_stack_ends_with_the_process_that_started_it_however_that_ends(
    stacks: Stacks, cell: Cell
) -> None:
    cell.of(stack="debian12")
    parent = stacks("debian12").workspace.folder("p")
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from integration.stacks import Stack
        from integration.stand import Machine, Workspace
        workspace = Workspace(Path({str(parent)!r}))
        stack = Stack(workspace, "debian12")
        print(stack.pid, Machine(stack).pid, workspace.path, flush=True)
        time.sleep(60)
        """
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        *pids, folder = run.stdout.readline().split()
        namespace = Path(f"/proc/{pids[0]}/ns/mnt").readlink()
        assert len(holding(namespace)) >= 3  # process 1, libvirtd, QEMU
        assert (Path(folder) / "s1/run/libvirt-sock").is_socket()
    finally:
        run.kill()
        run.communicate()
    deadline = time.monotonic() + 60
    while left := [*holding(namespace), *naming(Path(folder)), *parent.iterdir()]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)
    assert folder not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.scenario("one command starts it, ^C leaves no trace")
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_started_and_ended_by_one_command(
    name: str, stacks: Stacks, tmp_path: Path, cell: Cell
) -> None:
    cell.of(stack=name)
    if name in RELEASES:
        stacks(name)  # to be built in this test's time is not what is meant here
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "integration.stacks", "start", name]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert run.stdout is not None
        uri = run.stdout.readline().split()[2]
        assert run.stdout.readline().split()[-1].startswith(str(tmp_path))
        line = run.stdout.readline()
        if name != "embedded":
            settings = Path(line.rpartition("CKPTMGR_CONFIG=")[2].strip()).read_text()
            assert Path(settings.split('"')[1]).is_dir()
            line = run.stdout.readline()
        assert line == "ends with ^C\n"
        mounts = Path(f"/proc/{run.pid}/ns/mnt").readlink()
        nodes = ["virsh", "-c", uri, "version"]
        printed = subprocess.run(nodes, check=True, capture_output=True, text=True).stdout
        assert "Running hypervisor: QEMU" in printed
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate()
    assert run.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert naming(tmp_path) == holding(mounts) == []
    assert str(tmp_path) not in Path("/proc/net/unix").read_text()
