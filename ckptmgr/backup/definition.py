"""The definition of a domain that is made from a restore point: pure.

Of the point's ``<domain>`` this changes what must not be shared with the domain that it was taken
from, and what names a file that was restored to another place:

    <domain type='kvm'>
      <name>web</name>                                      the new name
      <uuid>6695eb01-…</uuid>                               the new UUID; in <sysinfo> as well
      <genid>43dc0cf8-…</genid>                             another one: the guest is told
      <metadata><ckptmgr:current …/></metadata>             the marker goes
      <os>
        <kernel>/boot/vmlinuz</kernel>                      the copy
        <nvram template='…'>/var/…/web_VARS.fd</nvram>      the copy, or none: libvirt makes one
      </os>
      <devices>
        <disk type='block' device='disk'>                   file
          <driver name='qemu' type='raw'/>                  the format of the restored image
          <source dev='/dev/vg/web'/>                       its path, and nothing else
          <backingStore …/>                                 goes: libvirt looks itself
          <target dev='vda' bus='virtio'/>
        </disk>
        <interface type='network'>
          <mac address='52:54:00:…'/>                       another one
        </interface>
      </devices>
    </domain>

Everything else stays as it is, known or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree

from ..errors import InvalidDocument
from ..xml import NAMESPACE, parse, to_text

WHAT = "the domain's XML in the restore point"

_PATHS = {"kernel": "os/kernel", "initrd": "os/initrd", "dtb": "os/dtb"}
"""Files of a point that an element names by its text, by role."""


@dataclass(frozen=True)
class Image:
    """Where a disk was restored to.

    path -- absolute
    format -- qcow2 or raw
    block -- it is a block device
    """

    path: Path
    format: str
    block: bool = False


@dataclass(frozen=True)
class Identity:
    """What a new domain has of its own.

    uuid, genid -- as libvirt writes UUIDs
    mac -- gives a new MAC address at every call
    """

    name: str
    uuid: str
    genid: str
    mac: Callable[[], str]


@dataclass(frozen=True)
class Redefinition:
    """The new definition.

    text -- of ``<domain>``
    dropped -- disks that were left out: not restored, and the other domain's to write to
    notes -- what else there is to know, for people
    """

    text: str
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def redefined(
    text: str, identity: Identity, images: Mapping[str, Image], files: Mapping[str, Path]
) -> Redefinition:
    """The definition of a new domain, from that of a restore point.

    images -- by the target of the disk
    files -- by role (nvram, varstore, kernel, initrd, dtb): the copies; tpm: the folder, where the
             definition names one

    Raises InvalidDocument.
    """
    root = parse(text, what=WHAT)
    if root.tag != "domain":
        raise InvalidDocument(f"{WHAT}: <domain> was expected, not <{root.tag}>")
    _unset(root, "id")
    _set_identity(root, identity)
    _remove_marker(root)
    notes = _point_to_files(root, files)
    for mac in root.findall("devices/interface/mac"):
        mac.set("address", identity.mac())
    notes += [
        f"the image of disk {target} was encrypted, and the restored one is not"
        for target in _encrypted(root, images)
    ]
    dropped = _replace_disks(root, images)
    notes += [
        f"disk {target} is left out: it was not restored, and writing to the image of the other "
        "domain would harm that"
        for target in dropped
    ]
    return Redefinition(to_text(root), tuple(dropped), tuple(notes))


def _set_identity(root: etree._Element, identity: Identity) -> None:
    name = root.find("name")
    if name is None:
        raise InvalidDocument(f"{WHAT} has no <name>")
    name.text = identity.name
    uuid = root.find("uuid")
    if uuid is None:
        uuid = etree.Element("uuid")
        name.addnext(uuid)
    uuid.text = identity.uuid
    # libvirt wants it to be the domain's.
    for entry in root.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = identity.uuid
    for genid in root.findall("genid"):
        genid.text = identity.genid


def _remove_marker(root: etree._Element) -> None:
    for metadata in root.findall("metadata"):
        for element in metadata.findall(f"{{{NAMESPACE}}}*"):
            metadata.remove(element)
        if len(metadata) == 0:
            root.remove(metadata)


def _point_to_files(root: etree._Element, files: Mapping[str, Path]) -> list[str]:
    notes = []
    for role, path in _PATHS.items():
        element = root.find(path)
        if element is not None and role in files:
            element.text = str(files[role])
    for element in root.findall("os/nvram"):
        _set_nvram(element, files.get("nvram"))
        if "nvram" not in files:
            notes.append("the firmware's variables are not in the point: the domain gets new ones")
    for element in root.findall("os/varstore"):
        _unset(element, "path")
        if "varstore" in files:
            element.set("path", str(files["varstore"]))
    for source in root.findall("devices/tpm/backend[@type='emulator']/source"):
        # Else libvirt has a folder for each UUID (swtpmStorageDir of qemu_conf.c).
        if "tpm" in files:
            source.set("path", str(files["tpm"]))
        else:
            _parent(source).remove(source)
    return notes


def _set_nvram(element: etree._Element, path: Path | None) -> None:
    """A text, or since libvirt 8.5 ``<nvram type='file'><source file='…'/></nvram>``."""
    for child in list(element):
        element.remove(child)
    _unset(element, "type")
    element.text = None if path is None else str(path)


def _replace_disks(root: etree._Element, images: Mapping[str, Image]) -> list[str]:
    """Give the disks their images; returns the disks that were taken out."""
    disks = root.findall("devices/disk")
    for target in sorted(images.keys() - {_target(disk) for disk in disks}):
        raise InvalidDocument(f"{WHAT} has no disk {target}, of which there is an image")
    dropped = []
    for disk in disks:
        target = _target(disk)
        if target in images:
            _set_image(disk, images[target])
        elif disk.get("device") == "floppy" and disk.find("readonly") is None:
            _eject(disk)
        elif _is_written(disk):
            _parent(disk).remove(disk)
            dropped.append(target)
    return dropped


def _set_image(disk: etree._Element, image: Image) -> None:
    disk.set("type", "block" if image.block else "file")
    if disk.get("device") == "lun" and not image.block:
        # SCSI commands are passed on to devices alone.
        disk.set("device", "disk")
        _unset(disk, "rawio", "sgio")
    _eject(disk)
    driver = disk.find("driver")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", image.format)
    source = etree.Element("source")
    source.set("dev" if image.block else "file", str(image.path))
    driver.addnext(source)


def _eject(disk: etree._Element) -> None:
    """Take out what is said of the medium: its place, chain, secrets, running copies."""
    for tag in ("source", "backingStore", "mirror", "encryption", "auth"):
        for element in disk.findall(tag):
            disk.remove(element)


def _encrypted(root: etree._Element, images: Mapping[str, Image]) -> list[str]:
    """The disks among `images` whose content was encrypted: what is backed up is the content."""
    return [
        _target(disk)
        for disk in root.findall("devices/disk")
        if _target(disk) in images and next(disk.iter("encryption"), None) is not None
    ]


def _is_written(disk: etree._Element) -> bool:
    """Whether two domains with this disk could write to the same place."""
    if disk.find("source") is None or disk.get("device") == "cdrom":
        return False
    return disk.find("readonly") is None


def _target(disk: etree._Element) -> str:
    target = disk.find("target")
    return "" if target is None else str(target.get("dev", ""))


def _unset(element: etree._Element, *attributes: str) -> None:
    for attribute in attributes:
        if attribute in element.attrib:
            del element.attrib[attribute]


def _parent(element: etree._Element) -> etree._Element:
    parent = element.getparent()
    assert parent is not None  # noqa: S101 -- it was found below <devices>
    return parent
