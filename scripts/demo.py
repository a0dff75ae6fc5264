"""The demonstration: a throw-away Linux VM, checkpoints while it writes, what changed between;
backups, a revert, a backup of the branch, and a restore that is compared with the VM.

Every line that begins with a $ is a command that is run for real, as a process, on a libvirt
embedded in a temporary folder.  Nothing outside that folder is touched and nothing is left.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from integration.stand import MIB, DiskSpec, Workspace, adopt, reap, rounded
from integration.stand.accel import domain_type
from integration.stand.guest import MEMORY, Boot, Shell
from integration.stand.libvirts import qemu_conf
from integration.stand.machine import domain_xml

DISKS = (
    DiskSpec("vda", size=256 * MIB, backing=("qcow2",)),
    DiskSpec("vdb", size=1024 * MIB),
)

screen = Console(highlight=False, soft_wrap=True)


class Demo:
    """The machine, and the commands that are shown."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._root = workspace.folder("r")
        self._uri = f"qemu:///embed?root={self._root}"
        log = f"3:file:{self._root}/libvirt.log"
        self._environment = {**os.environ, "LIBVIRT_LOG_OUTPUTS": log}
        self._environment["LIBVIRT_DEFAULT_URI"] = self._uri
        self._ckptmgr = str(Path(sys.executable).with_name("ckptmgr"))
        self._shell: Shell | None = None
        self.images: dict[str, Path] = {}

    # --- the machine ------------------------------------------------------------------------

    def start(self) -> None:
        """Define and start the VM, and wait until its Linux answers."""
        (self._root / "etc").mkdir()
        (self._root / "etc/qemu.conf").write_text(qemu_conf())
        images = self._workspace.folder("i")
        paths = {disk.target: path for disk in DISKS if (path := disk.make(images))}
        self.images = paths
        boot = Boot.prepare(self._workspace.folder("g"))
        definition = images / "demo.xml"
        definition.write_text(
            domain_xml(
                "demo",
                DISKS,
                paths,
                memory=MEMORY,
                os_elements=boot.os_elements,
                devices=boot.devices,
            )
        )
        self._virsh("define", str(definition))
        self._virsh("start", "demo")
        self._record()
        self._shell = Shell(boot)

    def _record(self) -> None:
        """See that the VM ends with this program."""
        self._workspace.record(int((self._root / "run/qemu/demo.pid").read_text()))

    def came_back(self) -> None:
        """The VM's QEMU was replaced by a revert: talk to the new one."""
        self._record()
        boot = self.guest.boot
        self.guest.close()
        self._shell = Shell(boot)

    def folder(self, name: str) -> Path:
        """A new folder that ends with this program."""
        return self._workspace.folder(name)

    def _virsh(self, *arguments: str) -> None:
        done = subprocess.run(
            ["virsh", "-q", "-c", self._uri, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"virsh {arguments[0]}: {done.stderr.strip()}")

    @property
    def guest(self) -> Shell:
        """The VM's command line."""
        assert self._shell is not None  # noqa: S101 -- start() comes first
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

    # --- the commands -----------------------------------------------------------------------

    def show(self, *arguments: str) -> None:
        """Run a ckptmgr command as the user would, and let it print."""
        screen.print(f"\n[bold]$ {shlex.join(['ckptmgr', *arguments])}[/]")
        subprocess.run([self._ckptmgr, *arguments], env=self._environment, check=True)

    def extents(self, *arguments: str) -> dict[str, list[tuple[int, int]]]:
        """What ``ckptmgr diff`` says, disk -> extents."""
        command = [self._ckptmgr, "-q", "--json", "diff", "--extents", *arguments]
        done = subprocess.run(command, env=self._environment, check=True, stdout=subprocess.PIPE)
        disks = json.loads(done.stdout)["disks"]
        return {disk["name"]: [tuple(each) for each in disk["extents"]] for disk in disks}

    def same(self, image: Path, target: str) -> bool:
        """Whether an image reads as the disk of the VM, which writes nothing now."""
        self._virsh("suspend", "demo")
        command = ["qemu-img", "compare", "-q", "-U", str(image), str(self.images[target])]
        same = subprocess.run(command, check=False).returncode == 0
        self._virsh("resume", "demo")
        return same

    def close(self) -> None:
        """Hang up; the workspace ends the machine."""
        if self._shell is not None:
            self._shell.close()


def tell(text: str) -> None:
    """A line of explanation."""
    screen.print(f"\n[cyan]{text}[/]")


def run(demo: Demo) -> None:
    """The demonstration itself."""
    begun = time.monotonic()
    accelerator = "KVM" if domain_type() == "kvm" else "TCG (no working KVM here)"
    tell(f"Starting a Linux VM with two disks on an embedded libvirt, {accelerator} ...")
    demo.start()
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
    repository = str(demo.folder("b"))
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
    restored = demo.folder("o")
    demo.show("restore", repository, "demo", "sunday", str(restored), "--flatten")
    for disk in DISKS:
        if not demo.same(restored / f"{disk.target}.qcow2", disk.target):
            raise SystemExit(f"{disk.target}: the restored disk is not what the VM has")
    screen.print("\n[green]Compared: the restored disks are those of the VM, byte for byte.[/]")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demonstration; whatever happens, leave nothing behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    adopt()
    reap()
    try:
        with Workspace() as workspace:
            demo = Demo(workspace)
            try:
                run(demo)
            finally:
                demo.close()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                screen.print("\n[dim]cleaning up: the VM, its disks and its libvirt[/]")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
