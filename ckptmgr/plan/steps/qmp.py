"""Steps that are QMP commands to the domain's QEMU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .served import Export


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
