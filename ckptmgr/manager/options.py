"""The options of a backup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from .. import operation
from ..errors import InvalidRequest


class BackupOptions(TypedDict, total=False):
    """How `Domain.backup` makes a restore point.

    full -- stand on no other point; default: of each disk what changed since the last one
    disks -- targets or paths; default: all disks that hold data
    compress -- with zstd
    quiesce -- freeze the guest's file systems for that instant; default: if its agent is there
    pause -- have the guest stand still for that instant
    limit -- bytes per second; default: none
    new -- begin anew where there were restore points that are not there any more; default: refuse,
           since their file system may just not be mounted
    decrypt -- encrypted disks, too, though what is kept of them is not encrypted; default: refuse
    """

    full: bool
    disks: Sequence[str]
    compress: bool
    quiesce: bool | None
    pause: bool
    limit: int | None
    new: bool
    decrypt: bool


def backup_request(
    repository: str | Path, name: str | None, options: BackupOptions
) -> operation.point.Request:
    """What is asked for, as the use case takes it.  Raises InvalidRequest for a wrong limit."""
    limit = options.get("limit")
    if limit is not None and limit <= 0:
        raise InvalidRequest(f"{limit} bytes per second is not a limit: it must be more than 0")
    return operation.point.Request(
        Path(repository).absolute(),
        name,
        full=options.get("full", False),
        disks=tuple(options.get("disks", ())),
        compress=options.get("compress", False),
        quiesce=options.get("quiesce"),
        pause=options.get("pause", False),
        limit=limit,
        new=options.get("new", False),
        decrypt=options.get("decrypt", False),
    )
