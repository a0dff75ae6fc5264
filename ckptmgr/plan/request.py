"""What the planners are asked for: data that the use cases fill in from what they found.

The three planner modules (libvirt, monitor, offline) have the same four functions:

    create(CreateRequest) -> Plan              make a checkpoint, read the intervals that it ends,
                                               serve what the disks are at that instant
    delete(DeleteRequest) -> Plan              remove a checkpoint's bitmaps and metadata
    read(ReadRequest) -> Plan                  read "since ... until now" from recording bitmaps
    undo_create(UndoRequest) -> (Step, ...)    take back a create, complete or not, at any time

`layers` are what the adapter found; the libvirt engine works without (only the monitor could
tell it, and using the monitor taints the domain), the other two need them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..domain.disk import DiskLayers
from .steps import Server


@dataclass(frozen=True)
class CreateDisk:
    """A disk that a new checkpoint tracks.

    granularity -- of the new bitmap, in bytes; None: QEMU's default
    persistent -- the bitmap is to be kept in the image
    since -- the checkpoint whose bitmap, still recording, has the interval that the new one ends;
             None: there is none, or it is known to be broken
    since_granularity -- of that bitmap as recorded; None where not known
    scratch -- path for a scratch file of this disk, on the hypervisor
    """

    target: str
    granularity: int | None = None
    persistent: bool = True
    since: str | None = None
    since_granularity: int | None = None
    layers: DiskLayers | None = None
    scratch: str | None = None


@dataclass(frozen=True)
class ServeDisk:
    """A disk whose data, as of the instant of a checkpoint, is to be served over NBD.

    image, format -- its top image on this machine, for the offline engine; None: it has no path
    scratch -- path on the hypervisor of a file for what is overwritten meanwhile
    """

    target: str
    image: str | None = None
    format: str | None = None
    layers: DiskLayers | None = None
    scratch: str | None = None


@dataclass(frozen=True)
class CreateRequest:
    """A checkpoint to make.

    document -- for virDomainCheckpointCreateXML; "" where libvirt does not make it
    redefinition -- for REDEFINE of the same checkpoint, to tell libvirt or to take it back
    disks -- those that it tracks, in the domain's order
    socket -- where NBD is to be served: a path in a folder where QEMU may bind, or for the libvirt
              engine an address; None where no map can be read (then no disk has a `since`)
    tell_libvirt -- whether libvirt is told of a checkpoint that another engine makes
    quiesce -- seconds for the guest agent to freeze and thaw; None: not to be asked
    serve -- disks whose data is to be served until the plan's `finish`
    """

    name: str
    document: str
    redefinition: str
    disks: tuple[CreateDisk, ...]
    socket: Server | None = None
    tell_libvirt: bool = False
    quiesce: float | None = None
    serve: tuple[ServeDisk, ...] = ()


@dataclass(frozen=True)
class UndoRequest:
    """A create to take back; whatever part of it was done.

    redefinition -- as in CreateRequest
    disks -- the tracked disks as they are now; without layers for the libvirt engine
    socket -- as in CreateRequest
    told_libvirt -- libvirt may have been told of a checkpoint that another engine made
    """

    name: str
    redefinition: str
    disks: tuple[DiskLayers, ...] = ()
    socket: Server | None = None
    told_libvirt: bool = False


@dataclass(frozen=True)
class DeleteDisk:
    """A disk that a checkpoint to delete tracks.

    missing -- its bitmap is known not to be there (BitmapBroken.disk of an earlier try)
    """

    target: str
    layers: DiskLayers | None = None
    missing: bool = False


@dataclass(frozen=True)
class DeleteRequest:
    """A checkpoint to delete.

    disks -- those that it tracks and that the domain still has
    known_to_libvirt -- libvirt lists it
    redefinition -- for REDEFINE, to show libvirt a part of its disks or to make it known
    metadata_only -- leave the bitmaps alone
    """

    name: str
    disks: tuple[DeleteDisk, ...]
    known_to_libvirt: bool
    redefinition: str | None = None
    metadata_only: bool = False


@dataclass(frozen=True)
class ReadDisk:
    """A disk whose open interval is to be read.

    since -- the checkpoint whose bitmap is read
    granularity -- of that bitmap as recorded; None where not known
    scratch -- as in CreateDisk
    """

    target: str
    since: str
    granularity: int | None = None
    layers: DiskLayers | None = None
    scratch: str | None = None


@dataclass(frozen=True)
class ReadRequest:
    """Open intervals to read at one instant.

    socket -- as in CreateRequest
    """

    disks: tuple[ReadDisk, ...]
    socket: Server | None = None
