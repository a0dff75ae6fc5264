"""Steps that are calls of libvirt's checkpoint and backup API."""

from __future__ import annotations

from dataclasses import dataclass

from .served import Server


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
