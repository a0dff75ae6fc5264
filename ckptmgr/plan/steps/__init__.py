"""The steps that plans are made of: plain data, shown by --dry-run, executed by an engine.

A step is either done whole or not at all where the stack allows it (one libvirt call, one QMP
transaction, one qemu-img run).  Steps of an `undo` tolerate what is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...checkpoint import EngineName
from .api import (
    BackupBegin,
    BackupEnd,
    CheckpointCreate,
    CheckpointDelete,
    CheckpointPurge,
    CheckpointRedefine,
)
from .images import (
    ImageBitmap,
    ImagesCheck,
    ImagesRelease,
    ImagesServe,
    ImagesUnchanged,
    ReadImageMap,
)
from .qmp import (
    BitmapRef,
    BitmapsRemove,
    NbdExport,
    NbdStart,
    NbdStop,
    NodeExport,
    Scratch,
    ScratchAdd,
    ScratchExport,
    ScratchRemove,
    Transaction,
)
from .reading import DataServed, ReadMaps
from .served import Export, Server, TcpServer

__all__ = [
    "BackupBegin",
    "BackupEnd",
    "BitmapRef",
    "BitmapsRemove",
    "CheckpointCreate",
    "CheckpointDelete",
    "CheckpointPurge",
    "CheckpointRedefine",
    "DataServed",
    "Direct",
    "Export",
    "ImageBitmap",
    "ImagesCheck",
    "ImagesRelease",
    "ImagesServe",
    "ImagesUnchanged",
    "NbdExport",
    "NbdStart",
    "NbdStop",
    "NodeExport",
    "Plan",
    "Quiesced",
    "ReadImageMap",
    "ReadMaps",
    "Scratch",
    "ScratchAdd",
    "ScratchExport",
    "ScratchRemove",
    "Server",
    "Step",
    "TcpServer",
    "Transaction",
]


@dataclass(frozen=True)
class Quiesced:
    """One step with the guest's file systems frozen; they are thawed on every way out.

    timeout -- seconds for the guest agent to freeze, and to thaw
    """

    step: CheckpointCreate | BackupBegin | Transaction
    timeout: float

    def __str__(self) -> str:
        return f"{self.step}, with the guest's file systems frozen"


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
    | ImagesUnchanged
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
