"""The emulated host as a process: it is not left behind, and nobody else is let in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from integration.nested import Host, Image, Lan
from integration.stand import StandError, Workspace
from integration.stand.guest import kernel
from integration.stand.patience import patiently
from integration.stand.workspace import birth


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image that never gets anywhere: a kernel without a root to mount."""
    disk = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "host.qcow2"), "1M"]
    subprocess.run(disk, check=True)
    (tmp_path / "vmlinuz").write_bytes((kernel() / "vmlinuz").read_bytes())
    (tmp_path / "initrd").write_bytes(b"")
    (tmp_path / "lock").touch()
    return tmp_path


def _addresses(pid: int) -> list[str]:
    """The local addresses of a process's sockets for the internet, as /proc has them."""
    links = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(file.readlink()))
    found = []
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in links:
                found.append(fields[1].partition(":")[0])
    return found


def test_a_host_ends_with_its_runner_even_if_that_is_killed(folder: Path) -> None:
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from integration.nested import Host, Image
        from integration.stand import Workspace
        folder = Path({str(folder)!r})
        with Workspace(folder) as workspace:
            host = Host(workspace, Image(folder, (folder / "lock").open()))
            print(host.pid, flush=True)
            time.sleep(600)
        """
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert birth(pid) is not None
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    deadline = time.monotonic() + patiently(10)
    while birth(pid) is not None:
        assert time.monotonic() < deadline, "QEMU has outlived its runner"
        time.sleep(0.05)


@pytest.mark.thorough
def test_two_hosts_listen_on_loopback_only_and_a_host_that_does_not_boot_is_an_error(
    folder: Path,
) -> None:
    ends = (
        Lan(folder, "one", "two", "192.168.77.1/24"),
        Lan(folder, "two", "one", "192.168.77.2/24"),
    )
    with Workspace(folder) as workspace:
        image = Image(folder, (folder / "lock").open())
        with (
            Host(workspace, image, "one", memory=256, lan=ends[0]) as one,
            Host(workspace, image, "two", memory=256, lan=ends[1]) as two,
        ):
            with pytest.raises(StandError, match=r"one has (not booted|ended)"):
                one.wait(patiently(3))
            for host in (one, two):
                deadline = time.monotonic() + patiently(30)
                while not _addresses(host.pid):
                    assert time.monotonic() < deadline, "it does not listen"
                    time.sleep(0.1)
                assert set(_addresses(host.pid)) == {"0100007F"}
        assert workspace.running() == []
