"""Whether a recorded bitmap can still mean what it says: pure.

libvirt judges a bitmap by its flags alone (qemuBlockBitmapChainIsValid); it never compares sizes
or images.  A block job after a resize then loses a bitmap's bits without a word (libvirt 9.0:
checkpoint, snapshot, blockresize, blockpull: an increment is all clean although the disk has
changed), because bitmaps of different sizes cannot be merged and the failure is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint import CheckpointDisk
from .domain.disk import Disk


@dataclass(frozen=True)
class Doubt:
    """Why the bitmap of a recorded disk must not be trusted.

    code -- what check calls it: disk-gone, disk-shrunk, bitmap-lost-in-job, layer-smaller
    reason -- for people
    """

    code: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def doubt(recorded: CheckpointDisk, disks: Sequence[Disk]) -> Doubt | None:
    """Why the bitmap of a recorded disk must not be trusted, or None.

    recorded -- a disk of a checkpoint, as it was then
    disks -- the domain's disks now
    """
    disk = next((disk for disk in disks if disk.target == recorded.name), None)
    if disk is None or disk.empty:
        return Doubt("disk-gone", "the domain has no such disk now")
    uneven = _uneven(recorded, disk)
    if uneven is not None:
        return Doubt(
            "layer-smaller",
            f"{uneven} has another size than the disk, so it cannot be read across the layers",
        )
    if recorded.size is None or disk.size is None or recorded.size == disk.size:
        return None
    if disk.size < recorded.size:
        return Doubt(
            "disk-shrunk",
            f"the disk is smaller than it was ({disk.size} bytes, {recorded.size} then)",
        )
    if moved(recorded, disk):
        return Doubt(
            "bitmap-lost-in-job",
            f"the disk has grown and {recorded.source} has left its backing chain since: "
            "a block job cannot have kept the bitmap",
        )
    return None


def _uneven(recorded: CheckpointDisk, disk: Disk) -> str | None:
    """The layer of another size, down to that on which the bitmap began, or None.

    QEMU merges no bitmaps of different sizes.
    """
    for image in disk.chain if not moved(recorded, disk) else ():
        if image.size is not None and disk.size is not None and image.size != disk.size:
            return image.source
        if recorded.source is None or recorded.source in (image.source, image.path):
            return None
    return None


def moved(recorded: CheckpointDisk, disk: Disk) -> bool:
    """Whether the image that a disk had then is not in its backing chain any more."""
    names = {name for image in disk.chain for name in (image.source, image.path)}
    return recorded.source is not None and recorded.source not in names
