"""What of a disk the domain's XML does not say: volumes' paths, headers, sizes, backing chains."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OperationFailed
from ..volume import parse_volume_name
from . import images, nodes
from .binding import libvirt
from .chain import read_chain
from .connection import Connection
from .disk import Disk, Image, Layer

log = logging.getLogger("ckptmgr")


def described(disk: Disk, handle: Any, connection: Connection, *, active: bool) -> Disk:
    """A disk with what its images say, and for an inactive domain with its backing chain.

    handle -- the virDomain; active -- whether it runs
    """
    if disk.empty:
        return disk
    disk = replace(disk, chain=tuple(located(image, connection) for image in disk.chain))
    if connection.local:
        if not active and not disk.chain_known:
            disk = _with_chain(disk)
        disk = replace(disk, chain=tuple(images.described(image) for image in disk.chain))
        disk = replace(disk, size=disk.top.size)
    if disk.size is None and not (connection.local and _is_no_qcow2(disk.top)):
        disk = replace(disk, size=_capacity(disk, handle))
    return disk


def located(image: Image, connection: Connection) -> Image:
    """A volume under the path that its pool gives it, as the layers of chains are named, too."""
    named = parse_volume_name(image.source) if image.type == "volume" else None
    if named is None or image.path is not None:
        return image
    pool, volume = named
    try:
        path = connection.handle.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()
    except libvirt.libvirtError as error:
        log.info("volume %s of pool %s has no path: %s", volume, pool, error)
        return image
    return replace(image, path=path, source=path) if path.startswith("/") else image


def _with_chain(disk: Disk) -> Disk:
    """The disk of an inactive domain with the backing chain that its image names."""
    top = disk.top
    if top.path is None or top.format is None:
        return disk
    try:
        if top.format == "qcow2":
            header = images.read_header(top.path)
            if header is not None and header.backing_file is None:
                return replace(disk, chain_known=True)
        layers = read_chain(top.path, top.format)
    except (OSError, OperationFailed) as error:
        log.info("disk %s: the backing chain is not known: %s", disk.target, error)
        return disk
    below = tuple(_image(layer) for layer in layers[len(disk.chain) :])
    return replace(disk, chain=disk.chain + below, chain_known=True)


def _is_no_qcow2(image: Image) -> bool:
    """Whether a local image is not the qcow2 that it is to be: libvirt would read a size out of
    whatever there is (9.0).
    """
    if image.format != "qcow2" or image.path is None:
        return False
    try:
        return images.read_header(image.path) is None
    except OSError:
        return False


def _capacity(disk: Disk, handle: Any) -> int | None:
    try:
        capacity: int = handle.blockInfo(disk.target)[0]
    except libvirt.libvirtError as error:
        log.info("disk %s: the size is not known: %s", disk.target, error)
        return None
    # libvirt says 0 where it could not ask (an inactive domain's network disk).
    return capacity or None


def _image(layer: Layer) -> Image:
    """A layer that qemu-img found, as an image of a chain."""
    path = nodes.local_path(layer.image)
    kind = "file" if path is None or not Path(path).is_block_device() else "block"
    return Image(
        type="network" if path is None else kind,
        source=path or layer.image,
        path=path,
        format=layer.format,
    )
