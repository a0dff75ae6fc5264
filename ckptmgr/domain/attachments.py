"""Files beside the disks that a domain is made of, by its XML: firmware, kernel, TPM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import Driver
from ..xml import parse
from .folders import tpm_states


@dataclass(frozen=True)
class Attachment:
    """A file, or a folder with files, that belongs to a domain.

    role -- nvram (firmware variables), varstore (the same, of firmware that is not memory-mapped),
            kernel, initrd, dtb, tpm (a folder, the state of an emulated TPM)
    """

    role: str
    path: Path


def attachments(
    definition: str, uuid: str, driver: Driver, embedded_root: Path | None
) -> tuple[Attachment, ...]:
    """What the definition names, or libvirt keeps by its rules, whether it is there or not.

    <os>
      <nvram>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
      <kernel>/boot/vmlinuz</kernel> <initrd>/boot/initrd</initrd>
    </os>
    <devices><tpm><backend type='emulator'/></tpm></devices>
    """
    root = parse(definition, what="the domain's XML")
    found = []
    for role in ("nvram", "kernel", "initrd", "dtb"):
        text = root.findtext(f"os/{role}", "").strip()
        source = root.find(f"os/{role}/source")
        if not text and source is not None:
            text = source.get("file", "")
        if text.startswith("/"):
            found.append(Attachment(role, Path(text)))
    varstore = root.find("os/varstore")
    if varstore is not None and varstore.get("path", "").startswith("/"):
        found.append(Attachment("varstore", Path(varstore.get("path", ""))))
    for backend in root.iterfind("devices/tpm/backend[@type='emulator']"):
        source = backend.find("source")
        named = source.get("path", "") if source is not None else ""
        folder = Path(named) if named.startswith("/") else tpm_states(driver, embedded_root) / uuid
        found.append(Attachment("tpm", folder))
    return tuple(found)


def members(folder: Path) -> Iterator[Path]:
    """The regular files in a folder and below, in a fixed order; links are passed over."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path
