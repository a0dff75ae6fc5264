"""A domain's libvirt snapshots: reading, making, reverting to and deleting them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import NoSnapshot
from ..snapshot import DiskImage, Snapshot, parse_snapshot, with_state
from ..volume import parse_volume_name
from .adapter import DomainAdapter
from .binding import libvirt
from .details import located
from .disk import Image
from .failure import translate

NO_SNAPSHOT = 72  # virErrorNumber NO_DOMAIN_SNAPSHOT


EXTERNAL_REVERT = 9_009_000


def snapshots(adapter: DomainAdapter) -> tuple[Snapshot, ...]:
    """All snapshots, parents before children."""
    with translate("listing the snapshots", adapter.name):
        found = adapter.handle.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
        return tuple(_read(adapter, each) for each in found)


def have_snapshots(adapter: DomainAdapter) -> bool:
    """Whether the domain has any."""
    with translate("counting the snapshots", adapter.name):
        return bool(adapter.handle.snapshotNum(0))


def snapshot(adapter: DomainAdapter, name: str) -> Snapshot:
    """The snapshot called `name`.  Raises NoSnapshot."""
    with translate(f"looking for snapshot {name!r}", adapter.name):
        try:
            found = adapter.handle.snapshotLookupByName(name, 0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != NO_SNAPSHOT:
                raise
            raise NoSnapshot(
                f"domain {adapter.name!r} has no snapshot {name!r}",
                hint="`ckptmgr snapshot list` lists them",
            ) from None
        return _read(adapter, found)


def _read(adapter: DomainAdapter, found: Any) -> Snapshot:
    """A virDomainSnapshot, its volumes under their paths."""
    snapshot = parse_snapshot(found.getXMLDesc(0), current=bool(found.isCurrent(0)))
    images = (_located(adapter, image) for image in snapshot.images)
    return replace(snapshot, images=tuple(image for image in images if image is not None))


def _located(adapter: DomainAdapter, image: DiskImage) -> DiskImage | None:
    """None for a volume that is on no path."""
    if parse_volume_name(image.path) is None:
        return image
    path = located(Image("volume", image.path), adapter.connection).path
    return None if path is None else replace(image, path=path)


def create(adapter: DomainAdapter, document: str, *, disk_only: bool) -> str:
    """Take a snapshot, whole or not at all; returns its name."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    if disk_only:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    with translate("taking the snapshot", adapter.name):
        name: str = adapter.handle.snapshotCreateXML(document, flags).getName()
    return name


def record_as_running(adapter: DomainAdapter, name: str) -> None:
    """Have a revert to the newest snapshot, taken of a domain that we had paused, let it run."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    with translate(f"redefining snapshot {name!r}", adapter.name):
        found = adapter.handle.snapshotLookupByName(name, 0)
        document = found.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
        running = with_state(document, "running")
        if running is not None:
            adapter.handle.snapshotCreateXML(running, flags)


def revert(adapter: DomainAdapter, name: str, *, paused: bool) -> None:
    """Revert to a snapshot.  With `paused` the domain is active, and has run not one instruction;
    otherwise it is in the state that the snapshot has.
    """
    # Without FORCE libvirt leaves it at a warning (REVERT_RISKY) where QEMU has to be started
    # anew; here all that can be seen to be unsafe was refused before.
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
    if paused:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED
    with translate(f"reverting to snapshot {name!r}", adapter.name):
        adapter.handle.revertToSnapshot(adapter.handle.snapshotLookupByName(name, 0), flags)


def reverts_external(adapter: DomainAdapter) -> bool:
    """Whether this libvirt reverts to external snapshots: since 9.9."""
    with translate("asking for libvirt's version", adapter.name):
        return bool(adapter.connection.handle.getLibVersion() >= EXTERNAL_REVERT)


def delete(adapter: DomainAdapter, name: str, *, children: bool, metadata: bool) -> None:
    """Delete a snapshot; with `children` those taken after it too, with `metadata` libvirt's
    record of it alone.
    """
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN if children else 0
    if metadata:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
    with translate(f"deleting snapshot {name!r}", adapter.name):
        adapter.handle.snapshotLookupByName(name, 0).delete(flags)
