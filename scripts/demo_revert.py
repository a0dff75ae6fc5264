"""Side by side: a snapshot is reverted with plain libvirt, and with ckptmgr.

Two throw-away Linux VMs that write the same.  Every line that begins with a $ is a command that
is run for real, as a process, on a libvirt embedded in a temporary folder.  Nothing outside that
folder is touched and nothing is left.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.markup import escape

from integration.stand import MIB, DiskSpec, Workspace, adopt, reap, rounded
from integration.stand.accel import domain_type
from integration.stand.guest import MEMORY, Boot, Shell
from integration.stand.libvirts import qemu_conf
from integration.stand.machine import domain_xml

DISK = DiskSpec("vda", size=256 * MIB)
BEFORE = [(8 * MIB, 65536)]
AFTER = [(40 * MIB, 2 * MIB)]
ABANDONED = [(100 * MIB, 4 * MIB)]
REVERTED = [(60 * MIB, 131072)]

screen = Console(highlight=False, soft_wrap=True)


class Lab:
    """A private libvirt, and the commands that are shown."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._root = workspace.folder("r")
        (self._root / "etc").mkdir()
        (self._root / "etc/qemu.conf").write_text(qemu_conf())
        self._environment = {
            **os.environ,
            "LIBVIRT_LOG_OUTPUTS": f"3:file:{self._root}/libvirt.log",
            "LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={self._root}",
        }
        self._shells: list[Shell] = []

    def start(self, name: str) -> Shell:
        """Define and start a VM, and wait until its Linux answers."""
        images = self._workspace.folder("i")
        path = DISK.make(images)
        boot = Boot.prepare(self._workspace.folder("g"))
        definition = images / "vm.xml"
        definition.write_text(
            domain_xml(
                name,
                [DISK],
                {} if path is None else {DISK.target: path},
                memory=MEMORY,
                os_elements=boot.os_elements,
                devices=boot.devices,
            )
        )
        self.quietly("virsh", "-q", "define", str(definition))
        self.quietly("virsh", "-q", "start", name)
        self.record(name)
        shell = Shell(boot)
        self._shells.append(shell)
        return shell

    def backup(self) -> Path:
        """The XML of an incremental backup since Tuesday."""
        path = self._root / "backup.xml"
        path.write_text(
            "<domainbackup><incremental>tuesday</incremental><disks><disk name='vda' type='file'>"
            f"<target file='{self._root}/backup.qcow2'/></disk></disks></domainbackup>\n"
        )
        return path

    def record(self, name: str) -> None:
        """See that the VM ends with this program."""
        self._workspace.record(int((self._root / f"run/qemu/{name}.pid").read_text()))

    def shell(self, shell: Shell) -> Shell:
        """The VM's command line after its QEMU was replaced."""
        shell.close()
        self._shells.append(again := Shell(shell.boot))
        return again

    def quietly(self, *words: str) -> str:
        """Run a command that is not shown, which has to succeed; returns what it printed."""
        done = self._run(words)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def show(self, *words: str) -> int:
        """Run a command as the user would, and show what it prints; returns its exit status."""
        screen.print(f"\n[bold]$ {escape(shlex.join(words))}[/]")
        done = self._run(words)
        for text, style in ((done.stdout, ""), (done.stderr, "yellow")):
            if text.strip():
                screen.print(text.rstrip(), style=style or None, markup=False)
        return done.returncode

    def _run(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        if program == "ckptmgr":
            program = str(Path(sys.executable).with_name("ckptmgr"))
        return subprocess.run(
            [program, *rest],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def close(self) -> None:
        """Hang up; the workspace ends the VMs."""
        for shell in self._shells:
            shell.close()


def tell(text: str) -> None:
    """A line of explanation."""
    screen.print(f"\n[cyan]{text}[/]")


def write(shell: Shell, ranges: Sequence[tuple[int, int]], pattern: int) -> None:
    """Let the guest write."""
    shown = ", ".join(f"{length // 1024} KiB at {offset // MIB} MiB" for offset, length in ranges)
    screen.print(f"[dim]in the VM: {shown}[/]")
    for offset, length in ranges:
        shell.write("vda", offset, length, pattern)


def with_plain_libvirt(lab: Lab) -> None:
    """Checkpoint, snapshot, checkpoint, revert: with virsh."""
    tell("1. Plain libvirt: a VM with a checkpoint, a snapshot, and another checkpoint.")
    shell = lab.start("plain")
    lab.show("virsh", "-q", "checkpoint-create-as", "plain", "monday")
    write(shell, BEFORE, 0x41)
    lab.show("virsh", "-q", "snapshot-create-as", "plain", "good")
    write(shell, AFTER, 0x42)
    lab.show("virsh", "-q", "checkpoint-create-as", "plain", "tuesday")
    write(shell, ABANDONED, 0x43)

    tell("Something went wrong on Tuesday, so we go back to the snapshot:")
    status = lab.show("virsh", "-q", "snapshot-revert", "plain", "good")
    lab.show("virsh", "-q", "domstate", "plain")
    if lab.quietly("virsh", "-q", "domstate", "plain").strip() != "running":
        screen.print("\n[red]The VM is gone.[/] We start it again, for an incremental backup:")
        lab.quietly("virsh", "-q", "start", "plain")
        lab.record("plain")
    elif status == 0:
        screen.print("\nThis libvirt manages that; and an incremental backup?")
    status = lab.show("virsh", "-q", "backup-begin", "plain", "--backupxml", str(lab.backup()))
    if status != 0:
        screen.print("\n[red]Its record of changes is broken: the next backup is a full one.[/]")


def with_ckptmgr(lab: Lab) -> None:
    """The same with ckptmgr."""
    tell("2. ckptmgr: the same VM, the same checkpoints, the same writes.")
    shell = lab.start("kept")
    lab.show("ckptmgr", "create", "kept", "monday")
    write(shell, BEFORE, 0x41)
    lab.show("ckptmgr", "snapshot", "create", "kept", "good")
    write(shell, AFTER, 0x42)
    lab.show("ckptmgr", "create", "kept", "tuesday")
    write(shell, ABANDONED, 0x43)

    begun = time.monotonic()
    if lab.show("ckptmgr", "snapshot", "revert", "kept", "good") != 0:
        raise SystemExit("the revert failed")
    seconds = time.monotonic() - begun
    lab.record("kept")
    lab.show("virsh", "-q", "domstate", "kept")
    screen.print(f"\n[green]It runs on ({seconds:.1f} s)[/], and the history has a branch:")
    lab.show("ckptmgr", "list", "kept", "--tree")
    reverted = lab.quietly("ckptmgr", "-q", "current", "kept", "--json")
    branch = json.loads(reverted)["name"]

    tell("The VM goes on, and the next incremental interval is small, and right:")
    shell = lab.shell(shell)
    write(shell, REVERTED, 0x44)
    lab.show("ckptmgr", "create", "kept", "wednesday")
    lab.show("ckptmgr", "diff", "kept", branch, "wednesday", "--extents")

    tell("And across the fork: what Tuesday had and Wednesday has not, or the other way round.")
    lab.show("ckptmgr", "diff", "kept", "tuesday", "wednesday", "--extents")

    require(lab, branch, "wednesday", rounded(REVERTED, size=DISK.size))
    require(lab, "tuesday", "wednesday", rounded([*BEFORE, *AFTER, *REVERTED], size=DISK.size))
    screen.print(
        "\n[green]Compared: that is what the VM wrote on the way from the one to the other, "
        "rounded to 64 KiB, and nothing else.[/]"
    )


def require(lab: Lab, start: str, end: str, expected: Sequence[tuple[int, int]]) -> None:
    """The difference is just that."""
    found = json.loads(
        lab.quietly("ckptmgr", "-q", "--json", "diff", "kept", start, end, "--extents")
    )
    (disk,) = found["disks"]
    if not disk["known"] or [tuple(each) for each in disk["extents"]] != list(expected):
        raise SystemExit(f"{start}..{end}: the difference is not what the VM wrote: {disk}")


def run(lab: Lab) -> None:
    """The demonstration itself."""
    accelerator = "KVM" if domain_type() == "kvm" else "TCG (no working KVM here)"
    tell(f"Two Linux VMs on an embedded libvirt, {accelerator}.")
    with_plain_libvirt(lab)
    with_ckptmgr(lab)


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
            lab = Lab(workspace)
            try:
                run(lab)
            finally:
                lab.close()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                screen.print("\n[dim]cleaning up: the VMs, their disks and their libvirt[/]")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
