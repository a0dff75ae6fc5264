"""The command line beside virsh: whole processes, and the library's list in this one.

On the daemon stand, where several processes can reach one libvirt.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import libvirt

import ckptmgr
from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ckptmgr.document import format_libvirt
from ckptmgr.domain.marker import Marker
from ckptmgr.store import DomainRecord, DomainStore, Store
from integration.stand import Daemon, DiskSpec, Machine, Workspace

from .timing import Clock, Row, in_turns

COUNT = 1000
START = 0.150
"""Seconds that ``ckptmgr --version`` may take."""


def measure(rounds: int) -> list[Row]:
    """Listing, and starting."""
    clock = Clock()
    with Workspace() as workspace:
        stand = Daemon(workspace)
        machine = Machine(stand, (DiskSpec("vda"),))
        folder = workspace.folder("store")
        with ckptmgr.connect(stand.uri, store=folder) as host:
            domain = host.domain(machine.name)
            _fill(machine, Store(folder).domain(domain.view.uuid))
            domain.adapter.set_marker(Marker(_name(COUNT - 1), COUNT))

            def ckptmgr_command(*words: str) -> None:
                _run(stand, [sys.executable, "-m", "ckptmgr", *words])

            def in_libvirt() -> None:
                for checkpoint in machine.domain.listAllCheckpoints(0):
                    checkpoint.getXMLDesc(0)

            connected = ("-c", stand.uri, "--store", str(folder))
            virsh = ["virsh", "-c", stand.uri, "checkpoint-list", machine.name]
            in_turns(
                clock,
                {
                    "list": lambda: ckptmgr_command(*connected, "list", machine.name),
                    "virsh list": lambda: _run(stand, virsh),
                    "checkpoints": domain.checkpoints,
                    "libvirt checkpoints": in_libvirt,
                    "version": lambda: ckptmgr_command("--version"),
                    "virsh version": lambda: _run(stand, ["virsh", "--version"]),
                    "help": lambda: ckptmgr_command("--help"),
                },
                rounds,
            )
        machine.destroy()
        stand.close()
    return _rows(clock)


def _fill(machine: Machine, store: DomainStore) -> None:
    """The same line of checkpoints in libvirt and in the store; no bitmap is made.

    Takes half a minute: libvirt loads its schema for each document.
    """
    definition = machine.domain.XMLDesc()
    names = [_name(number) for number in range(COUNT)]
    redefine = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    with store.lock(0):
        for number, name in enumerate(names):
            checkpoint = Checkpoint(
                name,
                created=1_700_000_000 + number,
                parent=names[number - 1] if number else None,
                engine=EngineName.LIBVIRT,
                disks=(CheckpointDisk("vda", bitmap=name, state=State.RECORDING),),
                domain_xml=definition,
            )
            machine.domain.checkpointCreateXML(format_libvirt(checkpoint), redefine)
            store.save_checkpoint(checkpoint)
        store.save_record(DomainRecord(machine.name, names[-1], COUNT))


def _name(number: int) -> str:
    return f"c{number:04}"


def _run(stand: Daemon, command: Sequence[str]) -> None:
    done = stand.run(command)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _rows(clock: Clock) -> list[Row]:
    def row(what: str, ours: str, against: str, bare: str, aim: float | None = None) -> Row:
        return Row(what, clock.median(ours), against, clock.median(bare), aim)

    many = f"{COUNT:,} checkpoints"
    return [
        row(f"ckptmgr list, {many}", "list", "virsh checkpoint-list", "virsh list", 1.0),
        row(
            "Domain.checkpoints()",
            "checkpoints",
            "listAllCheckpoints, each one's XML",
            "libvirt checkpoints",
        ),
        Row("ckptmgr --version", clock.median("version"), aim=START),
        row("", "version", "virsh --version", "virsh version"),
        Row("ckptmgr --help", clock.median("help")),
    ]
