"""The sample VMs of a host with nested KVM: small Linux guests on the system's libvirt.

    sample-vms start [web] [db]         make what is missing, let all run, with a few checkpoints
    sample-vms write web vda 8M 64K     let a guest write 64 KiB at 8 MiB, and flush
    sample-vms show                     what ckptmgr says about each
    sample-vms remove                   all of it goes, and what ckptmgr knew of it

As root; what is there already stays as it is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import libvirt
import libvirt_qemu

import ckptmgr
from integration.stand import MIB, DiskSpec
from integration.stand.guest import MEMORY, Boot, Shell, come_up
from integration.stand.machine import domain_xml

URI = "qemu:///system"
FOLDER = Path("/var/lib/libvirt/ckptmgr-samples")

Write = tuple[str, int, int]
"""Disk, offset, length."""


@dataclass(frozen=True)
class Sample:
    """A VM, and its checkpoints with what the guest writes after each."""

    name: str
    disks: tuple[DiskSpec, ...]
    story: tuple[tuple[str, str, tuple[Write, ...]], ...]

    @property
    def folder(self) -> Path:
        """Its images, kernel and console."""
        return FOLDER / self.name


SAMPLES = (
    Sample(
        "web",
        (
            DiskSpec("vda", size=256 * MIB, backing=("qcow2",)),
            DiskSpec("vdb", size=1024 * MIB),
        ),
        (
            ("monday", "before the update", (("vda", 8 * MIB, 3 * MIB), ("vdb", 512 * MIB, 4096))),
            ("tuesday", "after it", (("vdb", 64 * MIB, 2 * MIB), ("vdb", 900 * MIB, 8192))),
        ),
    ),
    Sample(
        "db",
        (DiskSpec("vda", size=512 * MIB),),
        (("start", "an empty disk", (("vda", 100 * MIB, 65536),)),),
    ),
)
KNOWN = [sample.name for sample in SAMPLES]


@contextmanager
def shell(sample: Sample) -> Iterator[Shell]:
    """The guest's command line, once it has booted."""
    found = Shell(Boot(sample.folder))
    try:
        yield found
    finally:
        found.close()


def start(connection: libvirt.virConnect, names: Sequence[str]) -> None:
    """Make what is missing and let all of it run."""
    for sample in [sample for sample in SAMPLES if not names or sample.name in names]:
        try:
            domain = connection.lookupByName(sample.name)
        except libvirt.libvirtError:
            domain = define(connection, sample)
        if not domain.isActive():
            domain.create()
            wait(domain, sample)
        require_kvm(domain)
        tell_story(sample)


def wait(domain: libvirt.virDomain, sample: Sample) -> None:
    """Wait until a guest that was started takes commands."""

    def again() -> None:
        domain.destroy()
        domain.create()

    come_up(Boot(sample.folder), domain, again, name=sample.name).close()


def define(connection: libvirt.virConnect, sample: Sample) -> libvirt.virDomain:
    """Make its images and define it."""
    shutil.rmtree(sample.folder, ignore_errors=True)
    # libvirt gives each file in it to QEMU, which runs as another user
    sample.folder.mkdir(parents=True, mode=0o755)
    paths = {disk.target: path for disk in sample.disks if (path := disk.make(sample.folder))}
    boot = Boot.prepare(sample.folder)
    text = domain_xml(
        sample.name,
        sample.disks,
        paths,
        memory=MEMORY,
        os_elements=boot.os_elements,
        devices=boot.devices,
        # what the tests find out by a trial is the point here
        accelerator="kvm",
    )
    domain = connection.defineXML(text)
    domain.setAutostart(1)
    return domain


def require_kvm(domain: libvirt.virDomain) -> None:
    """Ask its QEMU."""
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
    said = libvirt_qemu.qemuMonitorCommand(domain, "info kvm", flags).strip()
    print(f"{domain.name()}: {said}")
    if said != "kvm support: enabled":
        raise SystemExit(f"sample-vms: {domain.name()} does not run on KVM")


def tell_story(sample: Sample) -> None:
    """Make the checkpoints that it lacks, and let the guest write."""
    with ckptmgr.connect(URI) as host, shell(sample) as guest:
        domain = host.domain(sample.name)
        if domain.checkpoints().checkpoints:
            return
        for name, description, writes in sample.story:
            domain.create(name, description=description)
            for disk, offset, length in writes:
                guest.write(disk, offset, length)


def show() -> None:
    """What ckptmgr says."""
    for sample in SAMPLES:
        first = sample.story[0][0]
        for arguments in (["list", sample.name, "--tree"], ["diff", sample.name, first]):
            print(f"\n$ ckptmgr {' '.join(arguments)}", flush=True)
            subprocess.run(["ckptmgr", *arguments], check=False)


def remove(connection: libvirt.virConnect) -> None:
    """Everything of them."""
    for sample in SAMPLES:
        try:
            domain = connection.lookupByName(sample.name)
        except libvirt.libvirtError:
            continue
        with ckptmgr.connect(URI) as host:
            for root in host.domain(sample.name).checkpoints(roots=True).checkpoints:
                host.domain(sample.name).delete(root.name, children=True)
        if domain.isActive():
            domain.destroy()
        domain.undefine()
        shutil.rmtree(sample.folder)


def size(text: str) -> int:
    """Bytes, of ``64K``, ``8M``, ``1G`` or a plain number."""
    matched = re.fullmatch(r"(\d+)([KMG]?)", text)
    if matched is None:
        raise SystemExit(f"sample-vms: not a number of bytes: {text!r} (64K, 8M, 1G)")
    return int(matched[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[matched[2]]


def main(arguments: Sequence[str]) -> None:
    """Do what is asked for."""
    match arguments:
        case ["start", *names] if all(name in KNOWN for name in names):
            connection = libvirt.open(URI)
            start(connection, names)
            connection.close()
        case ["remove"]:
            connection = libvirt.open(URI)
            remove(connection)
            connection.close()
        case ["show"]:
            show()
        case ["write", name, disk, offset, length]:
            found = [sample for sample in SAMPLES if sample.name == name]
            if not found or disk not in [each.target for each in found[0].disks]:
                raise SystemExit(f"sample-vms: there is no disk {disk!r} of a sample {name!r}")
            with shell(found[0]) as guest:
                guest.write(disk, size(offset), size(length))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
