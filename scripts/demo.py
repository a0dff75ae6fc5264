"""The demonstration: a throw-away Linux VM, checkpoints while it writes, what changed between;
backups, a revert, a backup of the branch, and a restore that is compared with the VM.

Every line that begins with a $ is a command that is run for real, as a process, on a libvirt
embedded in a temporary folder.  Nothing outside that folder is touched and nothing is left.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stage import CKPTMGR, Stage, perform, screen, tell

from integration.stand import MIB, DiskSpec, Workspace, rounded
from integration.stand.accel import domain_type
from integration.stand.guest import Shell

DISKS = (
    DiskSpec("vda", size=256 * MIB, backing=("qcow2",)),
    DiskSpec("vdb", size=1024 * MIB),
)


class Demo(Stage):
    """The machine, and the commands that are shown."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self._shell: Shell | None = None

    def begin(self) -> None:
        """Define and start the VM, and wait until its Linux answers."""
        self._shell = self.start("demo", DISKS)

    def came_back(self) -> None:
        """The VM's QEMU was replaced by a revert: talk to the new one."""
        self.record("demo")
        self._shell = self.again(self.guest)

    @property
    def guest(self) -> Shell:
        """The VM's command line."""
        assert self._shell is not None  # noqa: S101 -- begin() comes first
        return self._shell

    def write(self, written: Mapping[str, Sequence[tuple[int, int]]], what: str) -> None:
        """Let the guest write these ranges."""
        ranges = "; ".join(
            f"{disk}: " + ", ".join(f"{size // 1024} KiB at {at // MIB} MiB" for at, size in each)
            for disk, each in written.items()
        )
        screen.print(f"\n[dim]in the VM: {what} ({ranges})[/]")
        for disk, each in written.items():
            for offset, length in each:
                self.guest.write(disk, offset, length)

    def show(self, *arguments: str) -> None:
        """Run a ckptmgr command as the user would, and let it print."""
        screen.print(f"\n[bold]$ {shlex.join(['ckptmgr', *arguments])}[/]")
        subprocess.run([CKPTMGR, *arguments], env=self.environment, check=True)

    def extents(self, *arguments: str) -> dict[str, list[tuple[int, int]]]:
        """What ``ckptmgr diff`` says, disk -> extents."""
        command = [CKPTMGR, "-q", "--json", "diff", "--extents", *arguments]
        done = subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE)
        disks = json.loads(done.stdout)["disks"]
        return {disk["name"]: [tuple(each) for each in disk["extents"]] for disk in disks}

    def same(self, image: Path, target: str) -> bool:
        """Whether an image reads as the disk of the VM, which writes nothing now."""
        self.quietly("virsh", "-q", "suspend", "demo")
        command = ["qemu-img", "compare", "-q", "-U", str(image), str(self.images[target])]
        same = subprocess.run(command, check=False).returncode == 0
        self.quietly("virsh", "-q", "resume", "demo")
        return same


def run(demo: Demo) -> None:
    """The demonstration itself."""
    begun = time.monotonic()
    accelerator = "KVM" if domain_type() == "kvm" else "TCG (no working KVM here)"
    tell(f"Starting a Linux VM with two disks on an embedded libvirt, {accelerator} ...")
    demo.begin()
    screen.print(f"[dim]it runs after {time.monotonic() - begun:.0f} s[/]")

    tell("1. A checkpoint is a point in time of all disks: from here on, writes are tracked.")
    demo.show("create", "demo", "monday", "--description", "before the update")

    monday = {"vda": [(8 * MIB, 3 * MIB), (100 * MIB, 65536)], "vdb": [(512 * MIB, 4096)]}
    demo.write(monday, "an update")
    demo.show("create", "demo", "tuesday")
    tuesday = {"vdb": [(64 * MIB, 2 * MIB), (900 * MIB, 8192)]}
    demo.write(tuesday, "a database at work")
    demo.show("create", "demo", "wednesday")

    tell("2. Checkpoints are made while the VM goes on writing: now to every MiB of vda.")
    demo.guest.churn("vda", MIB, 256)
    demo.guest.wait_churned(5)
    demo.show("create", "demo", "thursday", "--description", "in the middle of it")
    demo.guest.wait_churned(demo.guest.churned[-1] + 5)
    demo.guest.stop_churn()

    tell("3. The history, and what changed between each two.")
    demo.show("list", "demo", "--tree")
    demo.show("list", "demo", "--topological")
    demo.show("diff", "demo", "monday", "tuesday")
    demo.show("diff", "demo", "tuesday", "wednesday", "--extents")
    demo.show("diff", "demo", "wednesday", "thursday")
    demo.show("diff", "demo", "thursday")

    tell("4. A checkpoint goes; what it knew goes to its neighbour.")
    demo.show("delete", "demo", "tuesday")
    demo.show("list", "demo", "--tree")
    demo.show("diff", "demo", "monday", "wednesday")

    found = demo.extents("demo", "monday", "wednesday")
    for disk in DISKS:
        ranges = [*monday.get(disk.target, ()), *tuesday.get(disk.target, ())]
        if found[disk.target] != rounded(ranges, 65536, disk.size):
            raise SystemExit(f"{disk.target}: the difference is not what the VM wrote")
    screen.print(
        "\n[green]Compared: that is what the VM wrote, rounded to 64 KiB, and nothing else.[/]"
    )
    back_up(demo)


def back_up(demo: Demo) -> None:
    """Backups across a revert, and a restore."""
    repository = str(demo.workspace.folder("b"))
    tell("5. A backup: the first is a full one, the next has what changed.")
    demo.show("backup", "demo", repository, "friday", "--compress", "zstd")
    demo.write({"vda": [(40 * MIB, MIB)]}, "some work")
    demo.show("snapshot", "create", "demo", "good")
    demo.show("backup", "demo", repository, "saturday", "--compress", "zstd")
    demo.write(
        {"vda": [(60 * MIB, 2 * MIB)], "vdb": [(700 * MIB, MIB)]}, "something that goes wrong"
    )

    tell("6. We go back to the snapshot. The history forks there, and the next backup knows.")
    demo.show("snapshot", "revert", "demo", "good")
    demo.came_back()
    demo.write({"vdb": [(300 * MIB, MIB)]}, "what should have been done")
    demo.show("backup", "demo", repository, "sunday", "--compress", "zstd")
    demo.show("list", "demo", "--tree")
    demo.show("points", repository, "--tree")

    tell("7. Is the repository whole? And does the VM's present state come out of it?")
    demo.show("verify", repository)
    restored = demo.workspace.folder("o")
    demo.show("restore", repository, "demo", "sunday", str(restored), "--flatten")
    for disk in DISKS:
        if not demo.same(restored / f"{disk.target}.qcow2", disk.target):
            raise SystemExit(f"{disk.target}: the restored disk is not what the VM has")
    screen.print("\n[green]Compared: the restored disks are those of the VM, byte for byte.[/]")


def play(workspace: Workspace) -> None:
    """All of it."""
    demo = Demo(workspace)
    try:
        run(demo)
    finally:
        demo.close()


if __name__ == "__main__":
    sys.exit(perform(play))
