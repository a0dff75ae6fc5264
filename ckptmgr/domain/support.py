"""Whether libvirt's checkpoint and backup APIs work for a domain: pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..xml import parse

CAPABILITY = "incremental-backup"


@dataclass(frozen=True)
class Machine:
    """What libvirt's domain capabilities depend on."""

    emulator: str | None
    arch: str | None
    machine: str | None
    virt_type: str | None


def parse_machine(text: str) -> Machine:
    """The emulator, architecture, machine and type of a ``<domain>`` document."""
    root = parse(text, what="the domain's XML")
    kind = root.find("os/type")
    return Machine(
        emulator=root.findtext("devices/emulator"),
        arch=None if kind is None else kind.get("arch"),
        machine=None if kind is None else kind.get("machine"),
        virt_type=root.get("type"),
    )


def parse_backup_feature(text: str) -> bool:
    """``<features><backup supported='yes'/>`` of a ``<domainCapabilities>`` document."""
    backup = parse(text, what="libvirt's domain capabilities").find("features/backup")
    return backup is not None and backup.get("supported") == "yes"


def has_backup_feature(libvirt: int, qemu: int) -> bool:
    """Whether ``<backup supported='yes'/>`` is to be expected of these versions.

    They are as libvirt gives them, 7006000 for 7.6.0; QEMU's is that of the default emulator.
    """
    return libvirt >= 7_006_000 and qemu >= 6_001_000


def backup_support(
    feature: bool, added: Collection[str], deleted: Collection[str], blockdev: bool | None
) -> tuple[bool, str]:
    """Whether the APIs work, and why or why not, for people.

    feature -- what the domain capabilities say
    added, deleted -- the domain's own ``<qemu:capabilities>``; 7.0 has the feature only where
        the domain adds it
    blockdev -- whether the domain's disks are on -blockdev, None if there is none to tell by
    """
    if CAPABILITY in deleted:
        return False, f"the domain's <qemu:capabilities> takes {CAPABILITY} away"
    if blockdev is False:
        return False, "its disks are on -drive, and libvirt makes checkpoints on -blockdev only"
    if feature:
        return True, "libvirt supports checkpoints of this domain"
    if CAPABILITY in added:
        return True, f"the domain's <qemu:capabilities> adds {CAPABILITY}"
    return False, "libvirt does not support checkpoints with this domain's QEMU"
