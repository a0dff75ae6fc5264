"""Live migration between two hosts with KVM, of a Linux guest that goes on writing meanwhile.

The first of the two hosts is the machine that this runs on; ``vagrant/run-nested --migration``
boots both and says in CKPTMGR_TEST_OTHER_HOST how the second is reached by ssh.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from integration.stand import MIB, DiskSpec, Guest, System, Workspace, rounded
from integration.stand.guest import Shell
from integration.stand.patience import patiently

GRANULARITY = 65536
NAME = "wanderer"

pytestmark = pytest.mark.nested

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Other:
    """The second host.

    address -- of it, for ssh as root and for the migration
    """

    address: str
    workspace: Workspace

    def run(self, *command: str, stdin: int | None = subprocess.DEVNULL) -> None:
        """Run a command there."""
        subprocess.run(
            ["ssh", "-o", "BatchMode=yes", f"root@{self.address}", *command],
            stdin=stdin,
            check=True,
            timeout=patiently(60),
        )

    def output(self, *command: str) -> str:
        """Run a command there and return what it prints."""
        done = subprocess.run(
            ["ssh", "-o", "BatchMode=yes", f"root@{self.address}", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=patiently(60),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def diff(self, start: str, end: str | None = None) -> Ranges:
        """What ckptmgr says there about the one disk, which has to be known."""
        words = [start] if end is None else [start, end]
        printed = self.output("ckptmgr", "-q", "--json", "diff", "--extents", NAME, *words)
        (disk,) = json.loads(printed)["disks"]
        assert disk["known"], disk
        return [(offset, length) for offset, length in disk["extents"]]

    def filled(self, image: Path) -> int:
        """Length of the data at the beginning of an image there, once nobody writes to it."""
        lengths: list[int] = []
        while len(lengths) < 2 or lengths[-2] != lengths[-1]:
            printed = self.output("qemu-img", "map", "-U", "--output=json", str(image))
            end = 0
            for entry in json.loads(printed):
                if entry["start"] == end and entry["data"] and not entry["zero"]:
                    end += entry["length"]
            lengths.append(end)
        return lengths[-1]

    def copy(self, path: Path) -> None:
        """Copy a file or folder to the same place there."""
        pack = subprocess.Popen(["tar", "-C", "/", "-c", path.relative_to("/")], stdout=-1)
        with pack:
            self.run("tar", "-C", "/", "-x", stdin=pack.stdout.fileno() if pack.stdout else None)
        assert pack.returncode == 0

    @contextmanager
    def forward(self, socket: Path) -> Iterator[None]:
        """Let the unix socket of that path here be the one there."""
        socket.unlink(missing_ok=True)
        process = subprocess.Popen(
            [
                *("ssh", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-N"),
                *("-L", f"{socket}:{socket}", f"root@{self.address}"),
            ],
            stdin=subprocess.DEVNULL,
        )
        self.workspace.record(process.pid)
        deadline = time.monotonic() + patiently(30)
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline, "no forwarding"
            time.sleep(0.1)
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def connect(self) -> libvirt.virConnect:
        """Its libvirt."""
        return libvirt.open(f"qemu+ssh://root@{self.address}/system?no_tty=1")


@pytest.fixture
def other_host(workspace: Workspace) -> Iterator[Other]:
    yield Other(os.environ["CKPTMGR_TEST_OTHER_HOST"], workspace)


@pytest.fixture
def system(workspace: Workspace) -> Iterator[System]:
    stand = System(workspace)
    yield stand
    stand.close()


@pytest.mark.scenario("a live migration of a Linux guest that writes, to another host with KVM")
def test_no_write_of_a_guest_is_lost_from_its_history_while_it_migrates(
    system: System, other_host: Other, tmp_path: Path
) -> None:
    size = 32 * MIB
    before: dict[str, Ranges] = {"c0": [(5 * MIB, 70_000)], "c1": [(12 * MIB, 4096)]}
    store = Path("/var/lib/ckptmgr")
    with Guest(system, (DiskSpec("vda", size=size),), name=NAME) as guest:
        with ckptmgr.connect(system.uri, store=store) as host:
            domain = host.domain(NAME)
            for name, ranges in before.items():
                domain.create(name)
                for offset, length in ranges:
                    guest.shell.write("vda", offset, length, 0x41)
            assert extents(domain, "c0", "c1") == rounded(before["c0"], GRANULARITY)

        # what shared storage would have: the kernel, and an image to copy to
        boot, image = guest.shell.boot.folder, guest.machine.images["vda"]
        for name in ("vmlinuz", "initramfs"):
            other_host.copy(boot / name)
        other_host.run("mkdir", "-p", str(image.parent))
        other_host.run("qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size))

        guest.shell.churn("vda", GRANULARITY, size // GRANULARITY)
        guest.shell.wait_churned(3)
        target = other_host.connect()
        flags = (
            libvirt.VIR_MIGRATE_LIVE
            | libvirt.VIR_MIGRATE_PERSIST_DEST
            | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
            | libvirt.VIR_MIGRATE_NON_SHARED_DISK
        )
        where = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{other_host.address}"}
        guest.machine.domain.migrate3(target, where, flags)
        guest.shell.close()
        with ExitStack() as stack:
            stack.callback(forget, target)
            stack.enter_context(other_host.forward(boot / "port"))
            shell = stack.enter_context(closing(Shell(guest.shell.boot)))
            shell.stop_churn()
            end = other_host.filled(image)
            at_least = (guest.shell.churned[-1] + 1) * GRANULARITY
            print(f"when it left, the guest had written {at_least} bytes; in the end, {end}")
            assert end >= at_least
            other_host.copy(store)
            follow(other_host, shell, before, end)


def forget(target: libvirt.virConnect) -> None:
    """End the machine on the second host."""
    moved = target.lookupByName(NAME)
    moved.destroy()
    moved.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    target.close()


def follow(other_host: Other, shell: Shell, before: dict[str, Ranges], end: int) -> None:
    """On the second host, with its own ckptmgr: the history goes on.

    `end` -- the guest wrote to every granule below, before and during the move
    """
    assert other_host.diff("c0", "c1") == rounded(before["c0"], GRANULARITY)
    moving = [(0, end)]
    assert other_host.diff("c1") == rounded([*before["c1"], *moving], GRANULARITY)
    other_host.output("ckptmgr", "create", NAME, "c2")
    shell.write("vda", 31 * MIB, 4096, 0x42)
    assert other_host.diff("c1", "c2") == rounded([*before["c1"], *moving], GRANULARITY)
    assert other_host.diff("c2") == rounded([(31 * MIB, 4096)], GRANULARITY)
    names = other_host.output("ckptmgr", "list", NAME, "--name", "--topological").split()
    assert names == ["c0", "c1", "c2"]
    said = other_host.output("virsh", "qemu-monitor-command", NAME, "--hmp", "'info kvm'")
    assert said.strip() == "kvm support: enabled"


def extents(domain: ckptmgr.Domain, start: str, end: str | None = None) -> Ranges:
    """The difference on the one disk, which has to be known."""
    (disk,) = domain.diff(start, end).disks
    assert disk.known, disk.reason
    return disk.extents()
