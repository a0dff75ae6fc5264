"""What the demonstrations stand on: a libvirt embedded in a temporary folder, and VMs in it.

Nothing outside that folder is touched and nothing is left, however the demonstration ends.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from integration.stand import DiskSpec, Workspace, adopt, reap
from integration.stand.guest import MEMORY, Boot, Shell
from integration.stand.libvirts import embedded_root
from integration.stand.machine import domain_xml

CKPTMGR = str(Path(sys.executable).with_name("ckptmgr"))

screen = Console(highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """A line of explanation."""
    screen.print(f"\n[cyan]{text}[/]")


class Stage:
    """The libvirt and its VMs."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.root = embedded_root(workspace)
        self.environment = {
            **os.environ,
            "LIBVIRT_LOG_OUTPUTS": f"3:file:{self.root}/libvirt.log",
            "LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={self.root}",
        }
        self.images: dict[str, Path] = {}
        """The newest VM's: target -> image."""
        self._shells: list[Shell] = []

    def start(self, name: str, disks: Sequence[DiskSpec]) -> Shell:
        """Define and start a VM, and wait until its Linux answers."""
        images = self.workspace.folder("i")
        self.images = {disk.target: path for disk in disks if (path := disk.make(images))}
        boot = Boot.prepare(self.workspace.folder("g"))
        definition = images / "vm.xml"
        definition.write_text(
            domain_xml(
                name,
                disks,
                self.images,
                memory=MEMORY,
                os_elements=boot.os_elements,
                devices=boot.devices,
            )
        )
        self.quietly("virsh", "-q", "define", str(definition))
        self.quietly("virsh", "-q", "start", name)
        self.record(name)
        self._shells.append(shell := Shell(boot))
        return shell

    def record(self, name: str) -> None:
        """See that the VM ends with this program."""
        self.workspace.record(int((self.root / f"run/qemu/{name}.pid").read_text()))

    def again(self, shell: Shell) -> Shell:
        """The VM's command line after its QEMU was replaced."""
        shell.close()
        self._shells.append(new := Shell(shell.boot))
        return new

    def quietly(self, *words: str) -> str:
        """Run a command that is not shown, which has to succeed; returns what it printed."""
        done = self.run(words)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def run(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command; its output is text."""
        program, *rest = words
        return subprocess.run(
            [CKPTMGR if program == "ckptmgr" else program, *rest],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def close(self) -> None:
        """Hang up; the workspace ends the VMs."""
        for shell in self._shells:
            shell.close()


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def perform(play: Callable[[Workspace], None]) -> int:
    """Run a demonstration; whatever happens, leave nothing behind.  Returns the exit status.

    play -- gets the workspace, and closes what it has opened
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, _terminated)
    adopt()
    reap()
    try:
        with Workspace() as workspace:
            try:
                play(workspace)
            finally:
                for number in signals:
                    signal.signal(number, signal.SIG_IGN)
                screen.print("\n[dim]cleaning up: the VMs, their disks and their libvirt[/]")
    except KeyboardInterrupt:
        return 130
    return 0
