"""Whether a recorded bitmap can still mean what it says: pure.

libvirt judges a bitmap by its flags alone (qemuBlockBitmapChainIsValid); it never compares sizes
or images.  A block job after a resize then loses a bitmap's bits without a word (libvirt 9.0:
checkpoint, snapshot, blockresize, blockpull: an increment is all clean although the disk has
changed), because bitmaps of different sizes cannot be merged and the failure is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from .checkpoint import CheckpointDisk
from .domain.disk import Disk


def doubt(recorded: CheckpointDisk, disks: Sequence[Disk]) -> str | None:
    """Why the bitmap of a recorded disk must not be trusted, or None.

    recorded -- a disk of a checkpoint, as it was then
    disks -- the domain's disks now
    """
    disk = next((disk for disk in disks if disk.target == recorded.name), None)
    if disk is None or disk.empty:
        return "the domain has no such disk now"
    if recorded.size is None or disk.size is None or recorded.size == disk.size:
        return None
    if disk.size < recorded.size:
        return f"the disk is smaller than it was ({disk.size} bytes, {recorded.size} then)"
    if recorded.source is not None and recorded.source not in (
        name for image in disk.chain for name in (image.source, image.path)
    ):
        return (
            f"the disk has grown and {recorded.source} has left its backing chain since: "
            "a block job cannot have kept the bitmap"
        )
    return None
