"""A libvirt snapshot, as far as the history of checkpoints needs it: data, and its XML.

<domainsnapshot>
  <name>s1</name>
  <state>running</state>
  <creationTime>1795392011</creationTime>
  <memory snapshot='internal'/>
  <disks><disk name='vda' snapshot='internal'/></disks>
  <domain>… the marker as it was then, in <metadata> …</domain>
  <inactiveDomain>…</inactiveDomain>
</domainsnapshot>
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from lxml import etree

from .errors import InvalidDocument, InvalidRequest
from .marker import Marker, parse_marker
from .volume import volume_name
from .xml import NAMESPACE, parse, to_text

NAME_MAX = 200
"""Bytes in the name of a snapshot, at most; libvirt writes a file of that name and some more."""


class Kind(StrEnum):
    """Where a snapshot keeps something."""

    NO = "no"
    INTERNAL = "internal"
    EXTERNAL = "external"


@dataclass(frozen=True)
class DiskImage:
    """The top image that a disk had.

    path -- or ``volume:pool/name``, until its pool was asked
    format -- as the domain gives it: what the guest wrote must never be taken for a qcow2
    """

    target: str
    path: str
    format: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """One snapshot.

    created -- seconds since the epoch
    state -- libvirt's: running, paused, shutoff, disk-snapshot, …: that of the domain then
    memory -- whether and where the memory is kept
    disks -- by target; what the snapshot does not list is not in it
    marker -- the domain's marker when the snapshot was taken, None if it had none
    images -- the local files of the disks that the domain had then
    definition -- whether it has the domain's definition: libvirt reverts to none without
    """

    name: str
    created: int
    state: str
    parent: str | None = None
    current: bool = False
    memory: Kind = Kind.NO
    disks: tuple[tuple[str, Kind], ...] = ()
    marker: Marker | None = None
    images: tuple[DiskImage, ...] = ()
    definition: bool = True

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that was current then."""
        return None if self.marker is None else self.marker.checkpoint

    @property
    def external(self) -> bool:
        """Whether any part is kept in files of its own."""
        return self.memory is Kind.EXTERNAL or Kind.EXTERNAL in dict(self.disks).values()

    @property
    def starts(self) -> bool:
        """Whether a revert brings back a domain that has its memory, and so runs."""
        return self.memory is not Kind.NO


def parse_snapshot(text: str, *, current: bool = False) -> Snapshot:
    """Read what virDomainSnapshotGetXMLDesc prints.  Raises InvalidDocument."""
    root = parse(text, what="the snapshot's XML")
    name = root.findtext("name")
    created = root.findtext("creationTime") or ""
    if root.tag != "domainsnapshot" or not name or not created.isdecimal():
        raise InvalidDocument(
            "what libvirt gave as the snapshot's XML is not the XML of a snapshot"
        )
    memory = root.find("memory")
    return Snapshot(
        name=name,
        created=int(created),
        state=root.findtext("state") or "unknown",
        parent=root.findtext("parent/name"),
        current=current,
        memory=_kind(None if memory is None else memory.get("snapshot")),
        disks=tuple(
            (str(disk.get("name")), _kind(disk.get("snapshot")))
            for disk in root.iterfind("disks/disk")
        ),
        marker=_marker(root),
        images=tuple(_images(root)),
        definition=root.find("domain") is not None,
    )


def _kind(text: str | None) -> Kind:
    return Kind(text) if text in list(Kind) else Kind.NO


def _images(root: etree._Element) -> Iterator[DiskImage]:
    for disk in root.iterfind("domain/devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        driver = disk.find("driver")
        # A medium that is missing is for libvirt's startupPolicy to judge.
        kept = disk.get("device", "disk") in ("disk", "lun")
        if kept and target is not None and source is not None:
            path = source.get("file") or source.get("dev") or volume_name(source)
            if path:
                form = None if driver is None else driver.get("type")
                yield DiskImage(str(target.get("dev")), path, form)


def _marker(root: etree._Element) -> Marker | None:
    """The marker that a revert brings back; libvirt 7.0 takes that of the inactive domain."""
    for domain in ("domain", "inactiveDomain"):
        element = root.find(f"{domain}/metadata/{{{NAMESPACE}}}current")
        if element is not None:
            try:
                return parse_marker(etree.tostring(element, encoding="unicode", with_tail=False))
            except InvalidDocument:
                return None
    return None


def with_state(text: str, state: str) -> str | None:
    """The document of a paused domain's snapshot with another state; None if it was not paused."""
    root = parse(text, what="the snapshot's XML")
    element = root.find("state")
    if element is None or element.text != "paused":
        return None
    element.text = state
    return to_text(root)


def check_snapshot_name(name: str) -> str:
    """Return `name` if libvirt takes a snapshot of that name.  Raises InvalidRequest.

    With a quotation mark or a backslash, libvirt 9.0 reports success and QEMU has taken nothing; a
    long name is no longer that of a file when libvirt comes to write it.
    """
    if (
        name.isprintable()
        and not name.startswith(".")
        and not set('/\\"') & set(name)
        and 0 < len(name.encode(errors="replace")) <= NAME_MAX
    ):
        return name
    shown = name if len(name) <= 40 else name[:40] + "…"
    raise InvalidRequest(
        f"{shown!r} cannot be the name of a snapshot",
        hint=f"it must be printable, of at most {NAME_MAX} bytes, without a slash, backslash or "
        "quotation mark, and must not start with a dot",
    )


def format_snapshot(name: str | None, description: str | None, memory: str | None = None) -> str:
    """The document for virDomainSnapshotCreateXML; libvirt chooses the rest by its flags.

    memory -- absolute path of a file for the memory; the disks are kept in external files then.

    Raises InvalidRequest.
    """
    if memory is not None and not (memory.startswith("/") and memory.isprintable()):
        raise InvalidRequest(
            f"{memory!r} cannot be the file for a domain's memory",
            hint="give its absolute path on the hypervisor",
        )
    root = etree.Element("domainsnapshot")
    for tag, text in (("name", name), ("description", description)):
        if text is not None:
            etree.SubElement(root, tag).text = text
    if memory is not None:
        etree.SubElement(root, "memory", snapshot="external", file=memory)
    return to_text(root)
