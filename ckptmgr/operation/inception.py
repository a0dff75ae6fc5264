"""How the history of a new domain begins, or does not: its intent, and what becomes of that.

Where libvirt does not know the domain, what there is of it is taken back.  Where it does, its
images have recorded since they got their names, and its first checkpoint says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..align import untrackable
from ..backup import temporaries
from ..backup.placement import Kind
from ..backup.staging import Staged
from ..checkpoint import Checkpoint, EngineName
from ..document import format_libvirt
from ..domain.connection import Connection
from ..domain.disk import Disk
from ..errors import Busy, CkptmgrError, NoDomain, StoreDamaged, StoreFailed
from ..plan.steps import CheckpointRedefine
from ..store import DomainStore, Intent, Loaded, Store, files
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
            "files": {str(path): _identity(name) for name, path in (*pairs, *copies)},
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


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size]


# --- interrupted -------------------------------------------------------------------------------


def take_back_interrupted(connection: Connection, store: Store) -> None:
    """Take back what was being restored to a domain that never came to be."""
    for key in store.domains():
        part = store.domain(key)
        with suppress(Busy, StoreDamaged, StoreFailed):
            intent = part.read_intent()
            if intent is None or intent.operation != OPERATION:
                continue
            with part.lock(0):
                intent = part.read_intent()
                if intent is None or intent.data["uri"] != connection.uri:
                    continue
                if is_known(connection, key) is False:
                    _take_back(part, intent)


def is_known(connection: Connection, uuid: str) -> bool | None:
    """Whether libvirt knows the domain; None where that cannot be told."""
    try:
        connection.lookup(uuid)
    except NoDomain:
        return False
    except CkptmgrError:
        return None
    return True


def _take_back(part: DomainStore, intent: Intent) -> None:
    data = intent.data
    log.warning(
        "taking back an interrupted restore of point %s: domain %s was not defined",
        intent.names[0],
        data["domain"],
    )
    paths = [path for path in map(Path, data["temporaries"]) if temporaries.NAME.match(path.name)]
    for name, identity in data["files"].items():
        with suppress(OSError):
            if _identity(Path(name)) != identity:
                log.warning("%s stays: it is not what was written", name)
            elif name in data["replaced"]:
                log.warning("%s is replaced: what it held is gone", name)
            else:
                paths.append(Path(name))
    for path in paths:
        files.remove(path, sync=False)
    for name in data["volumes"]:
        log.warning("%s may be half written: what it held is gone", name)
    if data["tpm"] is not None and Path(data["tpm"]).is_dir():
        files.remove_tree(Path(data["tpm"]))
    for folder in data["folders"]:
        with suppress(OSError):
            Path(folder).rmdir()
    part.clear_intent()
    part.remove_unused()


# --- completed ---------------------------------------------------------------------------------


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
        return identity is not None and _identity(Path(str(disk.top.path)))[:2] == identity[:2]
    except OSError:
        return False
