"""Where the disks of a restore point go: pure decisions, refused before anything is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from .. import qcow2
from ..domain.images import LUKS
from ..errors import InvalidRequest
from .manifest import Manifest, PointDisk

_SECTOR = 512
_HEAD = 64


class Kind(StrEnum):
    """How a disk is restored."""

    OVERLAY = "overlay"
    """a new qcow2 image whose backing file is the point's image"""
    IMAGE = "image"
    """a new image that stands by itself"""
    REPLACEMENT = "replacement"
    """the same, which takes the name, owner and mode of an image that is there"""
    VOLUME = "volume"
    """a raw file or block device that is there, written from end to end"""


@dataclass(frozen=True)
class Request:
    """What is to be restored, and where to.

    folder -- for new images; None: there are none
    disks -- targets; none: all of the point, or where there is no folder those of `onto`
    onto -- targets and the volumes that they are written to
    flatten -- images that stand by themselves, and no overlays
    """

    point: str
    folder: Path | None = None
    disks: tuple[str, ...] = ()
    onto: Mapping[str, Path] = field(default_factory=dict)
    flatten: bool = False


@dataclass(frozen=True)
class Found:
    """What is under the name of a volume.

    path -- without symbolic links
    identity -- the same for two names of one file or device
    size -- in bytes
    qcow2 -- it begins as a qcow2 image does
    encrypted -- what it holds is a LUKS container, or an encrypted qcow2 image
    """

    path: Path
    identity: tuple[int, int]
    size: int
    block: bool = False
    qcow2: bool = False
    encrypted: bool = False


@dataclass(frozen=True)
class Place:
    """Where one disk goes.

    path -- absolute
    format -- qcow2 or raw
    block -- it is a block device
    """

    disk: str
    kind: Kind
    path: Path
    format: str
    size: int
    block: bool = False

    def __str__(self) -> str:
        match self.kind:
            case Kind.OVERLAY:
                return f"make {self.path}, an overlay of disk {self.disk}"
            case Kind.IMAGE:
                return f"write disk {self.disk} to {self.path} ({self.format}), checking digests"
            case Kind.REPLACEMENT:
                return f"replace {self.path} by disk {self.disk} ({self.format}), checking digests"
            case Kind.VOLUME:
                return f"clear {self.path} and write disk {self.disk} to it, checking digests"


def chosen(manifest: Manifest, names: tuple[str, ...]) -> tuple[PointDisk, ...]:
    """The disks called `names`, or all; in the order of the point.  Raises InvalidRequest."""
    known = ", ".join(disk.name for disk in manifest.disks)
    for name in names:
        if manifest.disk(name) is None:
            raise InvalidRequest(
                f"restore point {manifest.name} has no disk {name!r}", hint=f"its disks are {known}"
            )
    return tuple(disk for disk in manifest.disks if not names or disk.name in names)


def place(manifest: Manifest, request: Request, found: Mapping[str, Found]) -> tuple[Place, ...]:
    """Where each disk goes.

    found -- by disk, what there is under the names in `request.onto`

    Raises InvalidRequest.
    """
    chosen(manifest, tuple(request.onto))
    names = request.disks
    if request.folder is None:
        if not request.onto:
            raise InvalidRequest(
                "it is not said where to restore to",
                hint="name a folder, or give a volume with --onto",
            )
        if request.flatten:
            raise InvalidRequest("--flatten needs a folder; volumes are always written whole")
        names = names or tuple(request.onto)
        for name in names:
            if name not in request.onto:
                raise InvalidRequest(
                    f"it is not said where to restore disk {name} to",
                    hint="name a folder, or give a volume for it with --onto",
                )
    for name in request.onto:
        if names and name not in names:
            raise InvalidRequest(
                f"disk {name} has a volume (--onto), but is not one of the disks to restore"
            )
    identities = [each.identity for each in found.values()]
    if len(set(identities)) != len(identities):
        raise InvalidRequest("two disks cannot be restored onto the same volume")
    return tuple(
        _onto(disk, found[disk.name])
        if disk.name in request.onto
        else _into(disk, request.folder, request.flatten)
        for disk in chosen(manifest, names)
    )


def remarks(found: Mapping[str, Found]) -> tuple[str, ...]:
    """What there is to know of the volumes that are written to, by disk."""
    return tuple(
        f"{each.path} held a qcow2 image, and has disk {disk} as raw then: the definition of a "
        "domain that is to use it has to say so"
        for disk, each in found.items()
        if each.block and each.qcow2
    )


def _onto(disk: PointDisk, found: Found) -> Place:
    if found.encrypted:
        raise InvalidRequest(
            f"{found.path} is encrypted, and what is restored to it would not be",
            hint=f"if that is meant, remove the old contents first: wipefs --all {found.path}"
            if found.block or not found.qcow2
            else "restore to another place",
        )
    if found.qcow2 and not found.block:
        kind, form = Kind.REPLACEMENT, "qcow2"
    else:
        kind, form = Kind.VOLUME, "raw"
        # QEMU counts a raw file in whole sectors.
        size = found.size if found.block else -(-found.size // _SECTOR) * _SECTOR
        if size < disk.virtual_size:
            raise InvalidRequest(
                f"{found.path} has {found.size} bytes, and disk {disk.name} has "
                f"{disk.virtual_size}",
                hint="use a volume that is as large as the disk, or larger",
            )
    return Place(disk.name, kind, found.path, form, disk.virtual_size, found.block)


def _into(disk: PointDisk, folder: Path | None, flatten: bool) -> Place:
    assert folder is not None  # noqa: S101 -- place() saw to it
    form = "raw" if flatten and disk.format == "raw" else "qcow2"
    kind = Kind.IMAGE if flatten else Kind.OVERLAY
    return Place(disk.name, kind, folder / f"{disk.name}.{form}", form, disk.virtual_size)


def look(path: Path) -> Found:
    """What is under the name `path`.  Raises InvalidRequest for what is no volume."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
        block = stat.S_ISBLK(status.st_mode)
        if not block and not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"{path} is neither a file nor a block device")
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            head = os.pread(descriptor, _HEAD, 0)
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(
            f"the volume {path} cannot be used: {reason}",
            hint="--onto writes to volumes that are there; new images go into a folder",
        ) from error
    identity = (-1, status.st_rdev) if block else (status.st_dev, status.st_ino)
    return Found(real, identity, size, block, head.startswith(qcow2.MAGIC), _is_encrypted(head))


def _is_encrypted(head: bytes) -> bool:
    if head.startswith(qcow2.MAGIC):
        return any(head[32:36])  # crypt_method
    return head.startswith(LUKS)
