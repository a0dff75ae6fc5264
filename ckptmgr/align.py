"""align_disks: a request for a checkpoint against the domain's disks.

The rules are those of libvirt's virDomainCheckpointAlignDisks and qemuCheckpointPrepare
(libvirt 9.0, src/conf/checkpoint_conf.c and src/qemu/qemu_checkpoint.c), with one difference:
where nobody asked for a disk that cannot hold a bitmap, it is left out, with the reason, instead
of failing the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint import EngineName, check_name
from .domain.disk import Disk
from .errors import InvalidRequest, Unsupported

# QEMU's default for a qcow2 bitmap is the cluster size within these bounds, and the upper one
# for anything that has no clusters (bdrv_get_default_bitmap_granularity).
GRANULARITY_MIN = 4 * 1024
GRANULARITY_MAX = 64 * 1024

# Reasons for which a disk that is not tracked cannot have changed either.
EMPTY = "there is no medium in it"
READ_ONLY = "it is read-only"


@dataclass(frozen=True)
class DiskRequest:
    """What the user asked for one disk.

    disk -- target (``vda``) or absolute path of its source
    track -- False: the disk is to be left out
    bitmap -- name of the bitmap, if one was given; must be the checkpoint's
    """

    disk: str
    track: bool = True
    bitmap: str | None = None


@dataclass(frozen=True)
class AlignedDisk:
    """What a checkpoint does with one disk.

    bitmap -- name of the bitmap to make; None: the disk is not tracked, for `reason`
    persistent -- the bitmap is kept in the image
    granularity -- that QEMU will give the bitmap; None where it cannot be told beforehand
    """

    target: str
    bitmap: str | None = None
    persistent: bool = True
    granularity: int | None = None
    reason: str | None = None


def parse_disk_spec(spec: str) -> DiskRequest:
    """Parse ``vda``, ``vda=no``, ``vda=bitmap`` or ``vda=bitmap:NAME``.

    The disk may be an absolute path, which may contain ``=``.  Raises InvalidRequest.
    """
    disk, separator, value = spec.rpartition("=")
    if not separator or (spec.startswith("/") and not _is_disk_value(value)):
        disk, value = spec, "bitmap"
    if disk and value == "no":
        return DiskRequest(disk, track=False)
    if disk and value == "bitmap":
        return DiskRequest(disk)
    if disk and value.startswith("bitmap:") and value != "bitmap:":
        return DiskRequest(disk, bitmap=value.removeprefix("bitmap:"))
    raise InvalidRequest(
        f"{spec!r} does not say what to do with which disk",
        hint="use DISK, DISK=no or DISK=bitmap:NAME, where DISK is a target such as vda or a path",
    )


def _is_disk_value(value: str) -> bool:
    return value in ("no", "bitmap") or value.startswith("bitmap:")


def align_disks(
    name: str,
    disks: Sequence[Disk],
    requests: Sequence[DiskRequest],
    engine: EngineName,
) -> tuple[AlignedDisk, ...]:
    """Decide for each of the domain's `disks`, in their order, whether checkpoint `name` tracks it.

    Disks that nobody named are left out if any disk was named; otherwise all are tracked that
    can be.  Raises InvalidRequest for an unknown disk, one named twice, a bitmap that is not
    called as the checkpoint, a checkpoint without any tracked disk; Unsupported for a named disk
    that cannot hold a bitmap with this engine.
    """
    check_name(name)
    if not disks:
        raise InvalidRequest("the domain has no disks, so there is nothing to track")
    asked: dict[str, DiskRequest] = {}
    for request in requests:
        disk = find_disk(disks, request.disk)
        if disk.target in asked:
            raise InvalidRequest(f"disk {request.disk!r} is named twice (it is {disk.target})")
        if request.bitmap is not None and request.bitmap != name:
            raise InvalidRequest(
                f"the bitmap of disk {disk.target} must be called {name!r}, as its checkpoint, "
                f"and not {request.bitmap!r}"
            )
        asked[disk.target] = request
    aligned = tuple(_align(name, disk, asked, engine) for disk in disks)
    if all(disk.bitmap is None for disk in aligned):
        reasons = "; ".join(f"{disk.target}: {disk.reason}" for disk in aligned)
        raise (InvalidRequest if asked else Unsupported)(
            f"checkpoint {name!r} would track no disk ({reasons})",
            hint="name a disk to track with --disk" if asked else None,
        )
    return aligned


def _align(name: str, disk: Disk, asked: dict[str, DiskRequest], engine: EngineName) -> AlignedDisk:
    request = asked.get(disk.target)
    if request is not None and not request.track:
        return AlignedDisk(disk.target, reason="left out on request")
    if request is None and asked:
        return AlignedDisk(disk.target, reason="not among the disks asked for")
    reason = untrackable(disk, engine)
    if reason is None:
        return AlignedDisk(
            disk.target,
            bitmap=name,
            persistent=keeps_bitmaps(disk),
            granularity=default_granularity(disk),
        )
    if request is not None:
        hint = None
        if not keeps_bitmaps(disk) and untrackable(disk, EngineName.MONITOR) is None:
            hint = (
                "on a running domain --engine monitor can track it until QEMU ends, "
                "with a bitmap that is not kept in the image; this taints the domain"
            )
        raise Unsupported(f"disk {disk.target} cannot be tracked: {reason}", hint=hint)
    return AlignedDisk(disk.target, reason=reason)


def find_disk(disks: Sequence[Disk], name: str) -> Disk:
    """The disk with that target or, if it starts with a slash, that source.

    Raises InvalidRequest unless it is just one.
    """
    if not name.startswith("/"):
        found = [disk for disk in disks if disk.target == name]
    else:
        found = [
            disk for disk in disks if not disk.empty and name in (disk.top.path, disk.top.source)
        ]
    if len(found) == 1:
        return found[0]
    targets = ", ".join(disk.target for disk in disks)
    if found:
        raise InvalidRequest(
            f"{name!r} is the source of more than one disk", hint=f"name its target: {targets}"
        )
    raise InvalidRequest(f"the domain has no disk {name!r}", hint=f"its disks are {targets}")


def keeps_bitmaps(disk: Disk) -> bool:
    """Whether the disk's image can keep a bitmap: qcow2, and not of version 2."""
    return not disk.empty and disk.top.format == "qcow2" and disk.top.qcow2_version != 2


def untrackable(disk: Disk, engine: EngineName) -> str | None:
    """Why `engine` cannot track `disk`, for people; None if it can."""
    if disk.empty:
        return EMPTY
    if disk.read_only:
        return READ_ONLY
    if disk.transient:
        return "it is transient"
    if disk.top.type == "vhostuser":
        return "it is a vhost-user device, whose writes QEMU does not see"
    if disk.bus == "sd":
        return "libvirt runs no block operations on bus 'sd'"
    if keeps_bitmaps(disk) or engine is EngineName.MONITOR:
        return None
    if disk.top.format == "qcow2":
        return "its image is qcow2 version 2 (compat=0.10), which cannot keep bitmaps"
    return f"its image is {disk.top.format or 'of an unknown format'}, which cannot keep bitmaps"


def default_granularity(disk: Disk) -> int | None:
    """The granularity in bytes that QEMU gives a new bitmap of `disk`, None if not known."""
    if disk.empty:
        return None
    if disk.top.format != "qcow2":
        return GRANULARITY_MAX
    if disk.top.cluster_size is None:
        return None
    return min(max(disk.top.cluster_size, GRANULARITY_MIN), GRANULARITY_MAX)
