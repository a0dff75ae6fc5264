"""What a checkpoint cannot be, whether it is to be written or was read: pure."""

from __future__ import annotations

import re

from ..checkpoint import Checkpoint, CheckpointDisk, State, check_name
from ..errors import InvalidRequest

NUMBER_MAX = 2**63 - 1
"""The largest size, in bytes, and the largest number of any kind in a document."""

_TIME_MAX = 253402300799  # the end of the year 9999, the last that RFC 3339 can write
_MAP_DIGEST = re.compile(r"[0-9a-f]{64}")
_POINT = re.compile(r"[0-9a-f]{32}")


def fault(checkpoint: Checkpoint) -> str | None:
    """Why this cannot be a checkpoint, or None."""
    try:
        check_name(checkpoint.name)
        if checkpoint.parent is not None:
            check_name(checkpoint.parent)
    except InvalidRequest as error:
        return error.message
    if checkpoint.parent == checkpoint.name:
        return "it is its own parent"
    if not 0 <= checkpoint.created <= _TIME_MAX:
        return f"{checkpoint.created} is not a creation time"
    if checkpoint.point is not None and not _POINT.fullmatch(checkpoint.point):
        return f"{checkpoint.point!r} is not the identity of a restore point"
    names = [disk.name for disk in checkpoint.disks]
    if len(set(names)) != len(names):
        return "a disk occurs twice"
    faults = (_disk_fault(checkpoint, disk) for disk in checkpoint.disks)
    return next((found for found in faults if found is not None), None)


def _disk_fault(checkpoint: Checkpoint, disk: CheckpointDisk) -> str | None:
    where = f"disk {disk.name}"
    if not disk.name:
        return "a disk has no name"
    if disk.bitmap == "":
        return f"{where}: the bitmap has no name"
    if (disk.bitmap is None) is not (disk.state is State.NONE):
        return f"{where}: the state {disk.state} contradicts the bitmap {disk.bitmap}"
    granularity = disk.granularity
    if granularity is not None and (granularity < 512 or granularity & (granularity - 1)):
        return f"{where}: the granularity {granularity} is not a power of two from 512"
    if disk.size is not None and not 0 <= disk.size <= NUMBER_MAX:
        return f"{where}: {disk.size} is not a size"
    if disk.interval is None:
        return None
    if disk.bitmap is None:
        return f"{where} has an interval but is not tracked"
    interval = disk.interval
    try:
        check_name(interval.since)
    except InvalidRequest as error:
        return f"{where}, the start of its interval: {error.message}"
    if interval.since == checkpoint.name:
        return f"{where}: its interval starts where it ends"
    if interval.map is not None and not _MAP_DIGEST.fullmatch(interval.map):
        return f"{where}: {interval.map!r} is not the digest of a dirty map"
    if interval.map is not None and interval.reason is not None:
        return f"{where}: its interval is known, and unknown for a reason"
    return None
