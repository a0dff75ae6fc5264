"""The steps that plans are made of: plain data, shown by --dry-run, executed by an engine.

A step is either done whole or not at all where the stack allows it (one libvirt call, one QMP
transaction, one qemu-img run).  Steps of an `undo` tolerate what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import EngineName


@dataclass(frozen=True)
class Export:
    """A dirty bitmap to be read over NBD.

    disk -- the disk's target
    name -- the NBD export's name
    bitmap -- the bitmap's name; the metadata context is ``qemu:dirty-bitmap:<bitmap>``
    granularity -- of the bitmap, in bytes; None where it is not known
    """

    disk: str
    name: str
    bitmap: str
    granularity: int | None = None

    @property
    def context(self) -> str:
        """The NBD metadata context, as in QEMU's docs/interop/nbd.txt."""
        return f"qemu:dirty-bitmap:{self.bitmap}"


@dataclass(frozen=True)
class TcpServer:
    """libvirt's own NBD export of a running domain, reached over the network.

    host, port -- what the hypervisor's QEMU binds to, and where we connect
    tls -- both sides prove who they are (X.509), and nobody else can read
    certificates -- folder of ours with ca-cert.pem, client-cert.pem and client-key.pem; None:
        where libnbd looks
    """

    host: str
    port: int
    tls: bool = True
    certificates: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'nbds' if self.tls else 'nbd'}://{host}:{self.port}"


Server = str | TcpServer
"""Where NBD is served: the path of a unix socket, or an address."""


# --- libvirt's API ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointCreate:
    """virDomainCheckpointCreateXML."""

    document: str

    def __str__(self) -> str:
        return "libvirt: create the checkpoint"


@dataclass(frozen=True)
class CheckpointRedefine:
    """virDomainCheckpointCreateXML with REDEFINE; with VALIDATE where `validate`."""

    name: str
    document: str
    validate: bool = False

    def __str__(self) -> str:
        return f"libvirt: redefine checkpoint {self.name}"


@dataclass(frozen=True)
class CheckpointDelete:
    """virDomainCheckpointDelete; metadata alone with `metadata_only`."""

    name: str
    metadata_only: bool = False
    missing_ok: bool = False

    def __str__(self) -> str:
        what = "the metadata of checkpoint" if self.metadata_only else "checkpoint"
        return f"libvirt: delete {what} {self.name}"


@dataclass(frozen=True)
class CheckpointPurge:
    """Leave neither metadata nor bitmaps of a checkpoint behind, whatever there is of it.

    libvirt removes only bitmaps of checkpoints that it knows, and refuses to delete one whose
    bitmap is missing on any disk; so the checkpoint is redefined if libvirt does not list it, and
    again without each disk whose bitmap turns out to be missing.  Needs no monitor.

    document -- what libvirt's REDEFINE takes, with all disks that the checkpoint tracks
    """

    name: str
    document: str

    def __str__(self) -> str:
        return f"libvirt: remove what there is of checkpoint {self.name}"


@dataclass(frozen=True)
class BackupBegin:
    """virDomainBackupBegin in pull mode, with a checkpoint of the same instant.

    Refused as Busy, without waiting, while another job runs on the domain.
    """

    backup: str
    checkpoint: str | None

    def __str__(self) -> str:
        if self.checkpoint is None:
            return "libvirt: begin a pull backup job, to read dirty bitmaps from"
        return "libvirt: begin a pull backup job that creates the checkpoint at the same instant"


@dataclass(frozen=True)
class BackupEnd:
    """virDomainAbortJob of the pull backup that serves NBD at `socket`, and waiting for its end.

    Nobody else's job is touched; where there is none, there is nothing to do.
    """

    socket: Server

    def __str__(self) -> str:
        return "libvirt: end the pull backup job"


# --- QMP -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transaction:
    """One QMP ``transaction``: all of its actions or none."""

    actions: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        shown = "; ".join(
            f"{action['type']} {json.dumps(action['data'], sort_keys=True)}"
            for action in self.actions
        )
        return f"qmp: transaction [{shown}]"


@dataclass(frozen=True)
class BitmapRef:
    """A bitmap on a block node.

    disk, image -- of the node, for messages
    read_only -- the node must be made writable for a change of the bitmap
    """

    node: str
    name: str
    disk: str
    image: str
    read_only: bool = False


@dataclass(frozen=True)
class BitmapsRemove:
    """Remove bitmaps in one transaction, read-only backing nodes made writable around it."""

    bitmaps: tuple[BitmapRef, ...]
    missing_ok: bool = False

    def __str__(self) -> str:
        shown = ", ".join(f"{bitmap.node}/{bitmap.name}" for bitmap in self.bitmaps)
        nodes = dict.fromkeys(bitmap.node for bitmap in self.bitmaps if bitmap.read_only)
        around = f" ({', '.join(nodes)} made writable meanwhile)" if nodes else ""
        return f"qmp: remove the bitmap(s) {shown}{around}"


@dataclass(frozen=True)
class NbdStart:
    """nbd-server-start on a unix socket.  Busy if QEMU runs a server already: it has just one."""

    socket: str

    def __str__(self) -> str:
        return f"qmp: start an NBD server on {self.socket}"


@dataclass(frozen=True)
class NodeExport:
    """A block node with one of its bitmaps, exported read-only."""

    export: Export
    node: str


@dataclass(frozen=True)
class NbdExport:
    """block-export-add of each node."""

    exports: tuple[NodeExport, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{item.node}/{item.export.bitmap}" for item in self.exports)
        return f"qmp: export the bitmap(s) {shown} by NBD"


@dataclass(frozen=True)
class NbdStop:
    """nbd-server-stop, which ends all exports, if the server is the one listening on `socket`.

    Nobody else's server is touched; where there is none, there is nothing to do.
    """

    socket: str

    def __str__(self) -> str:
        return "qmp: stop the NBD server"


@dataclass(frozen=True)
class Scratch:
    """A disk's data as of an instant: a node over the disk's own, with what the guest overwrites.

    node -- of the disk's top image; file -- where it is kept; name -- of the new node
    """

    disk: str
    node: str
    file: str
    name: str


@dataclass(frozen=True)
class ScratchAdd:
    """Make qcow2 files as large as the disks, by QEMU itself, and nodes over the disks' own."""

    disks: tuple[Scratch, ...]

    def __str__(self) -> str:
        return f"qmp: add scratch files for {', '.join(each.disk for each in self.disks)}"


@dataclass(frozen=True)
class ScratchExport:
    """block-export-add of each scratch node."""

    disks: tuple[Scratch, ...]

    def __str__(self) -> str:
        return f"qmp: export the data of {', '.join(each.disk for each in self.disks)} by NBD"


@dataclass(frozen=True)
class ScratchRemove:
    """End all jobs that write into scratch files of ours, and remove their nodes.

    Where there are none, there is nothing to do.
    """

    def __str__(self) -> str:
        return "qmp: end the backup jobs and remove their scratch nodes"


# --- NBD -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataServed:
    """From here on the disks' data can be read: where, for whoever runs the plan.

    exports -- (disk, name of the export) each
    """

    socket: Server
    exports: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"nbd: the data of {', '.join(disk for disk, _ in self.exports)} is served"


@dataclass(frozen=True)
class ReadMaps:
    """Read dirty maps over NBD; unions where a disk occurs twice."""

    socket: Server
    exports: tuple[Export, ...]

    def __str__(self) -> str:
        disks = ", ".join(dict.fromkeys(export.disk for export in self.exports))
        where = f" from {self.socket}" if isinstance(self.socket, TcpServer) else ""
        return f"nbd: read the dirty map(s) of {disks}{where}"


# --- qemu-img and qemu-nbd -------------------------------------------------------------------


@dataclass(frozen=True)
class ImagesCheck:
    """See that images can be written and that nothing has them open, before any is changed.

    images -- (disk, path) each
    """

    images: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        shown = ", ".join(dict.fromkeys(image for _, image in self.images))
        return f"check that nothing uses {shown}"


@dataclass(frozen=True)
class ImageBitmap:
    """``qemu-img bitmap --<action> IMAGE BITMAP`` on a qcow2 image that nothing has open.

    action -- add, remove, clear, enable or disable
    granularity -- of a bitmap to add, in bytes; None: QEMU's default
    missing_ok -- a bitmap to remove need not be there, and nor need the image
    """

    disk: str
    image: str
    action: str
    bitmap: str
    granularity: int | None = None
    missing_ok: bool = False

    def __str__(self) -> str:
        return f"qemu-img: {self.action} bitmap {self.bitmap} in {self.image}"


@dataclass(frozen=True)
class ReadImageMap:
    """Read a bitmap of an image through qemu-nbd, which must be able to lock the image."""

    disk: str
    image: str
    bitmap: str
    granularity: int | None = None

    def __str__(self) -> str:
        return f"qemu-nbd: read bitmap {self.bitmap} of {self.disk} from {self.image}"


@dataclass(frozen=True)
class ImagesServe:
    """Serve images by qemu-nbd, read-only, all of them locked before any is read.

    images -- (disk, path, format) each
    """

    images: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        return f"qemu-nbd: serve the data of {', '.join(disk for disk, _, _ in self.images)}"


@dataclass(frozen=True)
class ImagesRelease:
    """End what `ImagesServe` began; where there is nothing, there is nothing to do."""

    def __str__(self) -> str:
        return "qemu-nbd: end"


# --- guest agent -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quiesced:
    """One step with the guest's file systems frozen; they are thawed on every way out.

    timeout -- seconds for the guest agent to freeze, and to thaw
    """

    step: CheckpointCreate | BackupBegin | Transaction
    timeout: float

    def __str__(self) -> str:
        return f"{self.step}, with the guest's file systems frozen"


# --- what the use cases do themselves ----------------------------------------------------------


@dataclass(frozen=True)
class Direct:
    """Something that no engine does: a call of libvirt's about the domain or its snapshots.

    words -- what it is, for people
    """

    words: str

    def __str__(self) -> str:
        return self.words


Step = (
    CheckpointCreate
    | CheckpointRedefine
    | CheckpointDelete
    | CheckpointPurge
    | BackupBegin
    | BackupEnd
    | Transaction
    | BitmapsRemove
    | NbdStart
    | NbdExport
    | NbdStop
    | ReadMaps
    | DataServed
    | ScratchAdd
    | ScratchExport
    | ScratchRemove
    | ImagesServe
    | ImagesRelease
    | ImagesCheck
    | ImageBitmap
    | ReadImageMap
    | Quiesced
    | Direct
)


@dataclass(frozen=True)
class Plan:
    """What an engine is to do.

    undo -- takes back whatever part of `steps` was done; every step of it tolerates that there
            is nothing to take back, so that it can run at any time, after any crash
    release -- the part of `undo` that only ends what served the operation (jobs, servers,
               temporary bitmaps).  To be run instead of `undo` when the steps failed with
               CheckpointExists: the bitmaps of that name are then somebody else's
    notes -- what the user should know: disks left out and why, a choice made
    finish -- to be run after `steps` when the data that they serve was read: ends what serves it
    """

    engine: EngineName
    steps: tuple[Step, ...]
    undo: tuple[Step, ...] = ()
    release: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    finish: tuple[Step, ...] = ()

    def lines(self) -> list[str]:
        """The plan for people, a line a step."""
        return [str(step) for step in (*self.steps, *self.finish)]
