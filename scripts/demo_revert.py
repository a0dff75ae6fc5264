"""Side by side: a snapshot is reverted with plain libvirt, and with ckptmgr.

Two throw-away Linux VMs that write the same.  Every line that begins with a $ is a command that
is run for real, as a process, on a libvirt embedded in a temporary folder.  Nothing outside that
folder is touched and nothing is left.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from stage import Stage, perform, screen, tell

from integration.stand import MIB, DiskSpec, Workspace, rounded
from integration.stand.accel import domain_type
from integration.stand.guest import Shell

DISK = DiskSpec("vda", size=256 * MIB)
BEFORE = [(8 * MIB, 65536)]
AFTER = [(40 * MIB, 2 * MIB)]
ABANDONED = [(100 * MIB, 4 * MIB)]
REVERTED = [(60 * MIB, 131072)]


class Lab(Stage):
    """A private libvirt, and the commands that are shown."""

    def backup(self) -> Path:
        """The XML of an incremental backup since Tuesday."""
        path = self.root / "backup.xml"
        path.write_text(
            "<domainbackup><incremental>tuesday</incremental><disks><disk name='vda' type='file'>"
            f"<target file='{self.root}/backup.qcow2'/></disk></disks></domainbackup>\n"
        )
        return path

    def show(self, *words: str) -> int:
        """Run a command as the user would, and show what it prints; returns its exit status."""
        screen.print(f"\n[bold]$ {escape(shlex.join(words))}[/]")
        done = self.run(words)
        for text, style in ((done.stdout, ""), (done.stderr, "yellow")):
            if text.strip():
                screen.print(text.rstrip(), style=style or None, markup=False)
        return done.returncode


def write(shell: Shell, ranges: Sequence[tuple[int, int]], pattern: int) -> None:
    """Let the guest write."""
    shown = ", ".join(f"{length // 1024} KiB at {offset // MIB} MiB" for offset, length in ranges)
    screen.print(f"[dim]in the VM: {shown}[/]")
    for offset, length in ranges:
        shell.write("vda", offset, length, pattern)


def with_plain_libvirt(lab: Lab) -> None:
    """Checkpoint, snapshot, checkpoint, revert: with virsh."""
    tell("1. Plain libvirt: a VM with a checkpoint, a snapshot, and another checkpoint.")
    shell = lab.start("plain", [DISK])
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
    shell = lab.start("kept", [DISK])
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
    shell = lab.again(shell)
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


def play(workspace: Workspace) -> None:
    """All of it."""
    lab = Lab(workspace)
    try:
        run(lab)
    finally:
        lab.close()


if __name__ == "__main__":
    sys.exit(perform(play))
