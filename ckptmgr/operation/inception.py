"""How the history of a new domain begins: its intent, and its first checkpoint.

Its images have recorded since they got their names, so that can be done at any time after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..align import untrackable
from ..backup import temporaries
from ..backup.placement import Kind
from ..backup.staging import Staged
from ..checkpoint import Checkpoint, EngineName
from ..document import format_libvirt
from ..domain.disk import Disk
from ..plan.steps import CheckpointRedefine
from ..store import Intent, Loaded, files
from . import projection
from .newcomer import COPIED, Making, tpm_state
from .session import Session
from .tracking import restored_disk, untracked_disk

log = logging.getLogger("ckptmgr")

OPERATION = "define"
"""Of the intent."""

_OFFLINE = EngineName.OFFLINE

NOT_OURS = "its image is not the one that was restored"


def intent_of(
    making: Making,
    names: Sequence[Path],
    disks: Sequence[Staged] = (),
    copies: Sequence[tuple[Path, Path]] = (),
) -> Intent:
    """What it takes to take it back or to complete it.

    names -- the temporary ones of the disks
    disks, copies -- once they are written
    """
    prepared, manifest = making.prepared, making.kept.manifest
    others = [path for role, path in prepared.files.items() if role in COPIED]
    names = [*names, *(temporaries.temporary(path, making.token) for path in others)]
    names += [each.temporary for each in disks if each.temporary is not None]
    pairs = [(each.temporary, each.place.path) for each in disks if each.temporary is not None]
    state = tpm_state(making.connection, prepared)
    return Intent(
        OPERATION,
        (manifest.name,),
        _OFFLINE.value,
        {
            "uri": making.connection.uri,
            "domain": prepared.identity.name,
            "id": manifest.id,
            "temporaries": [str(name) for name in names],
            "files": {str(path): identity_of(name) for name, path in (*pairs, *copies)},
            "replaced": [
                str(each.path) for each in prepared.places if each.kind is Kind.REPLACEMENT
            ],
            "volumes": [str(each.path) for each in prepared.places if each.kind is Kind.VOLUME],
            "folders": [str(folder) for folder in making.missing],
            "tpm": str(state) if _is_new(making, state) else None,
        },
    )


def _is_new(making: Making, state: Path | None) -> bool:
    """Whether the folder of the TPM's state is there for this domain alone."""
    if state is None:
        return False
    return state.name == making.part.uuid or state == making.prepared.files.get("tpm")


def identity_of(path: Path) -> list[int]:
    """What tells whether a file is still that which was written."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size]


def settle(session: Session, intent: Intent) -> None:
    """Begin the history of a domain that is defined; can be stopped at any point and called again.

    To be called under its lock.
    """
    name = intent.names[0]
    for path in map(Path, intent.data["temporaries"]):
        files.remove(path, sync=False)
    session = session.with_any_engine()
    loaded = session.loaded()
    if name not in loaded.history.checkpoints:
        checkpoint = _checkpoint(session, loaded, intent)
        for disk in checkpoint.disks:
            if disk.bitmap is None:
                log.warning("disk %s is not tracked: %s", disk.name, disk.reason)
        if all(disk.bitmap is None for disk in checkpoint.disks):
            log.warning("no disk of domain %s keeps a bitmap: no history", session.adapter.name)
            session.store.clear_intent()
            return
        session.store.save_checkpoint(checkpoint)
        loaded = session.loaded()
    history = replace(loaded.history, current=name)
    session.commit_current(history, loaded.record)
    if session.tells_libvirt:
        shown = format_libvirt(projection.shown(session, history, history.get(name)))
        session.engine(session.choice.engine).run((CheckpointRedefine(name, shown),))
    session.store.clear_intent()


def _checkpoint(session: Session, loaded: Loaded, intent: Intent) -> Checkpoint:
    """The first checkpoint: of the images as they were when they got their names."""
    name = intent.names[0]
    disks = [
        untracked_disk(disk, NOT_OURS)
        if untrackable(disk, _OFFLINE) is None and not _is_restored(disk, intent)
        else restored_disk(name, disk)
        for disk in session.disks
    ]
    return Checkpoint(
        name,
        int(time.time()),
        None,
        _OFFLINE,
        tuple(disks),
        domain_xml=session.definition(),
        point=intent.data["id"],
        generation=loaded.record.generation + 1,
    )


def _is_restored(disk: Disk, intent: Intent) -> bool:
    identity = intent.data["files"].get(disk.top.path)
    try:
        return identity is not None and identity_of(Path(str(disk.top.path)))[:2] == identity[:2]
    except OSError:
        return False
