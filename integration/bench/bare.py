"""The calls of libvirt that ckptmgr's commands stand on, made by hand and with nothing around."""

from __future__ import annotations

import time
from pathlib import Path

import libvirt
import nbd

_TITLE = "urn:ckptmgr:bench"
_EXPORT = """\
<disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='{since}'
      exportname='vda' exportbitmap='backup-vda'>
  <driver type='qcow2'/><scratch file='{folder}/bare.scratch'/>
</disk>"""


class Bare:
    """A running domain with the one disk vda.

    folder -- where its QEMU may make a socket and a scratch file
    """

    def __init__(self, domain: libvirt.virDomain, folder: Path) -> None:
        self.domain = domain
        self.folder = folder

    def create(self, name: str) -> None:
        """A checkpoint alone; what was written before it is then not known."""
        self.domain.checkpointCreateXML(_checkpoint(name), 0)

    def create_and_read(self, name: str, since: str) -> list[int]:
        """A checkpoint, and what was written since another, as NBD's extents of that instant."""
        socket = self.folder / "bare.sock"
        export = _EXPORT.format(since=since, folder=self.folder)
        backup = (
            f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/>"
            f"<disks>{export}</disks></domainbackup>"
        )
        self.domain.backupBegin(backup, _checkpoint(name), 0)
        extents = _read_map(socket)
        self.domain.abortJob()
        while self._has_job():
            time.sleep(0.002)
        return extents

    def _has_job(self) -> bool:
        try:
            self.domain.backupGetXMLDesc(0)
        except libvirt.libvirtError:
            return False
        return True

    def delete(self, name: str) -> None:
        """A checkpoint with its bitmap."""
        self.domain.checkpointLookupByName(name, 0).delete(0)

    def describe(self) -> None:
        """The domain as its next start would have it, which each checkpoint records."""
        self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)

    def mark(self, name: str | None) -> None:
        """An element in the domain's metadata, as the one that names the current checkpoint."""
        element = None if name is None else f"<current checkpoint='{name}' generation='1'/>"
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        self.domain.setMetadata(kind, element, "bench", _TITLE, flags)


def _checkpoint(name: str) -> str:
    disks = "<disks><disk name='vda' checkpoint='bitmap'/></disks>"
    return f"<domaincheckpoint><name>{name}</name>{disks}</domaincheckpoint>"


def _read_map(socket: Path) -> list[int]:
    extents: list[int] = []

    def extent(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        extents.extend(entries)
        return 0

    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.add_meta_context("qemu:dirty-bitmap:backup-vda")
    handle.connect_unix(str(socket))
    size, position = handle.get_size(), 0
    while position < size:
        handle.block_status(size - position, position, extent)
        position = sum(extents[::2])
    handle.shutdown()
    return extents
