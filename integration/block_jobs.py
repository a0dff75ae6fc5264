"""What others do to a machine's backing chains: virsh, virt-manager, other backup tools."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import libvirt
from lxml import etree

from integration.stand import Machine
from integration.stand.patience import patiently


def overlay(machine: Machine, *targets: str) -> dict[str, Path]:
    """``virsh snapshot-create --disk-only --no-metadata``; returns the overlays."""
    number = len(list(machine.folder.glob("*.over")))
    made = {
        target: machine.folder / f"{target}.{number}.over" for target in targets or machine.images
    }
    disks = "".join(
        f"<disk name='{disk.target}' snapshot='external'><source file='{made[disk.target]}'/>"
        "<driver type='qcow2'/></disk>"
        if disk.target in made
        else f"<disk name='{disk.target}' snapshot='no'/>"
        for disk in machine.disks
        if disk.target in machine.images
    )
    machine.domain.snapshotCreateXML(
        f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    machine.images.update(made)
    return made


def below(machine: Machine, target: str) -> list[Path]:
    """The images below a disk's top one, nearest first."""
    found = etree.fromstring(machine.domain.XMLDesc()).xpath(
        "devices/disk[target/@dev=$target]//backingStore/source/@file", target=target
    )
    assert isinstance(found, list)
    return [Path(str(file)) for file in found]


def commit(machine: Machine, target: str) -> None:
    """``virsh blockcommit --active --pivot``: the top image goes into the one below."""
    (base, *_) = below(machine, target)
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
    machine.domain.blockCommit(target, None, None, 0, flags)
    _pivot(machine, target)
    machine.images[target] = base


def pull(machine: Machine, target: str) -> None:
    """``virsh blockpull``: everything goes into the top image."""
    machine.domain.blockPull(target, 0, 0)
    _until(lambda: not machine.domain.blockJobInfo(target, 0))


def copy(machine: Machine, target: str, *, shallow: bool = False) -> Path:
    """``virsh blockcopy --pivot`` to a new qcow2."""
    to = machine.images[target].with_suffix(".copy")
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    if shallow:
        flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
    document = f"<disk type='file'><source file='{to}'/><driver type='qcow2'/></disk>"
    machine.domain.blockCopy(target, document, None, flags)
    _pivot(machine, target)
    machine.images[target] = to
    return to


def _pivot(machine: Machine, target: str) -> None:
    def ready() -> bool:
        state = machine.domain.blockJobInfo(target, 0)
        return bool(state) and state["cur"] == state["end"] and state["end"] > 0

    deadline = time.monotonic() + patiently(20)
    while True:
        _until(ready)
        try:
            machine.domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError as error:
            # ready for libvirt is a moment later than ready by the numbers
            if "not ready" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patiently(20)
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the block job does not get to its end")
        time.sleep(0.01)
