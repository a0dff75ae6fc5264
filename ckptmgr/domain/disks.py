"""A domain's disks, out of its XML: pure.

    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/img/top.qcow2' index='2'/>
      <backingStore type='file' index='3'>
        <format type='qcow2'/>
        <source file='/img/base.qcow2'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>

An empty ``<backingStore/>`` says that the chain ends; none at all, as in most inactive XML, that
nobody has looked.
"""

from __future__ import annotations

from dataclasses import replace

from lxml import etree

from ..errors import InvalidDocument
from ..volume import volume_name
from ..xml import parse
from .disk import Disk, Encryption, Image

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


def parse_disks(text: str) -> tuple[Disk, ...]:
    """The disks of a ``<domain>`` document, in its order.

    Sizes and qcow2 headers are not in the XML: `size`, `qcow2_version` and `cluster_size` are
    None.  Raises InvalidDocument.
    """
    root = parse(text, what="the domain's XML")
    if root.tag != "domain":
        raise InvalidDocument(f"expected a <domain> document, not <{root.tag}>")
    return tuple(_disk(element) for element in root.findall("devices/disk"))


def parse_capabilities(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a domain's ``<qemu:capabilities>`` adds and deletes."""
    root = parse(text, what="the domain's XML")

    def named(change: str) -> frozenset[str]:
        path = f"{{{QEMU_NAMESPACE}}}capabilities/{{{QEMU_NAMESPACE}}}{change}"
        return frozenset(element.get("capability", "") for element in root.findall(path))

    return named("add"), named("del")


def _disk(element: etree._Element) -> Disk:
    target = element.find("target")
    if target is None or not target.get("dev"):
        raise InvalidDocument("a <disk> of the domain's XML has no target")
    driver = element.find("driver")
    source = element.find("source")
    top = _image(element.get("type", "file"), source)
    chain: tuple[Image, ...] = ()
    known = True
    if top is not None:
        top = replace(
            top,
            format=None if driver is None else driver.get("type"),
            encryption=top.encryption or _encryption(element),
        )
        below, known = _backing(element.find("backingStore"))
        chain = (top, *below)
        # What has no backing format never has a backing file.
        known = known or chain[-1].format == "raw"
    alias = element.find("alias")
    return Disk(
        target=target.get("dev", ""),
        bus=target.get("bus", ""),
        device=element.get("device", "disk"),
        alias=None if alias is None else alias.get("name"),
        chain=chain,
        read_only=element.find("readonly") is not None,
        transient=element.find("transient") is not None,
        shareable=element.find("shareable") is not None,
        chain_known=known,
    )


def _backing(element: etree._Element | None) -> tuple[tuple[Image, ...], bool]:
    """The layers from a ``<backingStore>`` down, and whether the last one ends the chain."""
    layers: list[Image] = []
    while element is not None:
        source = element.find("source")
        kind = element.get("type")
        if kind is None and source is None:
            return tuple(layers), True
        image = _image(kind or "file", source)
        if image is None:
            return tuple(layers), False
        form = element.find("format")
        layers.append(
            replace(
                image,
                format=None if form is None else form.get("type"),
                index=_number(element, "index") or image.index,
            )
        )
        element = element.find("backingStore")
    return tuple(layers), False


def _image(kind: str, source: etree._Element | None) -> Image | None:
    """The image that a ``<source>`` of type `kind` names; None for an empty drive."""
    if source is None:
        return None
    name, path = _names(kind, source)
    if name is None:
        return None
    data = source.find("dataStore/source")
    data_file = None if data is None else data.get("file") or data.get("dev")
    slice_size = None
    piece = source.find("slices/slice[@type='storage']")
    if piece is not None:
        slice_size = _number(piece, "size")
    return Image(
        type=kind,
        source=name,
        path=path,
        index=_number(source, "index"),
        data_file=data_file or None,
        slice_size=slice_size,
        encryption=_encryption(source),
    )


def _encryption(parent: etree._Element) -> Encryption | None:
    """In the ``<source>``; or in the ``<disk>``, as before libvirt 3.9:

    <encryption format='luks'><secret type='passphrase' uuid='…'/></encryption>
    """
    element = parent.find("encryption")
    if element is None:
        return None
    secret = element.find("secret")
    names = () if secret is None else (("uuid", secret.get("uuid")), ("usage", secret.get("usage")))
    named = next(((kind, name) for kind, name in names if name), None)
    return Encryption(element.get("format", ""), named)


def _names(kind: str, source: etree._Element) -> tuple[str | None, str | None]:
    """How the image is named for people, and its local path where it has one."""
    get = source.get
    match kind:
        case "file" | "block":
            path = get("file") if kind == "file" else get("dev")
            return path or None, path or None
        case "dir":
            path = get("dir")
            return path or None, None
        case "network":
            return _network(source), None
        case "volume":
            return volume_name(source), None
        case "nvme":
            address = source.find("address")
            if address is None:
                return None, None
            number = {
                part: int(address.get(part, "0"), 16)
                for part in ("domain", "bus", "slot", "function")
            }
            pci = "{domain:04x}:{bus:02x}:{slot:02x}.{function:x}".format(**number)
            return f"nvme://{pci}/{get('namespace', '1')}", None
        case "vhostuser":
            return (f"vhostuser:{get('path')}" if get("path") else None), None
        case "vhostvdpa":
            return (f"vhostvdpa:{get('dev')}" if get("dev") else None), None
        case _:  # a type of a newer libvirt: there is something, and it is not ours to track
            values = sorted(f"{key!s}={get(key)}" for key in source.keys())  # noqa: SIM118
            return f"{kind}:{','.join(values)}", None


def _network(source: etree._Element) -> str | None:
    """``rbd://host:6789,other/pool/image``; a unix socket is a parameter, as in NBD's URIs."""
    protocol = source.get("protocol")
    if not protocol:
        return None
    hosts: list[str] = []
    sockets: list[str] = []
    for host in source.findall("host"):
        name = host.get("name", "")
        if host.get("socket"):
            sockets.append(host.get("socket", ""))
            continue
        shown = f"[{name}]" if ":" in name else name
        hosts.append(f"{shown}:{host.get('port')}" if host.get("port") else shown)
    query = source.get("query")
    parameters = ([query] if query else []) + [f"socket={socket}" for socket in sockets]
    name = source.get("name", "")
    slash = "/" if name and not name.startswith("/") else ""
    tail = "?" + "&".join(parameters) if parameters else ""
    return f"{protocol}://{','.join(hosts)}{slash}{name}{tail}"


def _number(element: etree._Element, attribute: str) -> int | None:
    text = element.get(attribute, "")
    return int(text) if text.isascii() and text.isdigit() else None
