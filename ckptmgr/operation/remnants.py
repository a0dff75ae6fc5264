"""What an interrupted restore left of a new domain that libvirt never knew.

Whoever asks for that domain is told.  It is taken back by `repair` of it, or by the next restore
that defines a domain.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..backup import temporaries
from ..checkpoint import EngineName
from ..consistency.findings import Finding, Settle
from ..domain.connection import Connection
from ..errors import Busy, CkptmgrError, NoDomain, ReadOnlyConnection, StoreDamaged, StoreFailed
from ..plan.steps import Direct, Plan
from ..store import DomainStore, Intent, Store, files
from .inception import OPERATION, identity_of

log = logging.getLogger("ckptmgr")

T = TypeVar("T")


@dataclass(frozen=True)
class Remains:
    """What goes, and what is to be said.

    files -- that were written for it
    tree -- the folder of its TPM's state
    folders -- that were made for it, and go if they are empty then; the innermost first
    """

    files: tuple[Path, ...]
    tree: Path | None
    folders: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that goes."""
        return (*self.files, *(() if self.tree is None else (self.tree,)), *self.folders)


def take_back_interrupted(connection: Connection, store: Store) -> None:
    """Take back what was being restored to domains that never came to be."""

    def act(part: DomainStore, intent: Intent) -> None:
        with suppress(StoreFailed):
            _take_back(part, intent)

    _each(connection, store, None, act)


def find(connection: Connection, store: Store, name: str) -> Finding | None:
    """What there is of a new domain with this name or UUID; nothing where the store keeps that from
    us: that there is no such domain is true all the same.
    """
    try:
        found = _each(connection, store, name, lambda part, intent: _finding(intent))
    except StoreFailed:
        return None
    return found[0] if found else None


def plan_take_back(connection: Connection, store: Store, name: str) -> Plan | None:
    """What take_back() would do."""
    require_writable(connection)
    found = _each(connection, store, name, lambda part, intent: _remains(intent))
    if not found:
        return None
    steps = tuple(Direct(f"remove {path}") for each in found for path in each.paths)
    notes = tuple(note for each in found for note in each.notes)
    return Plan(EngineName.OFFLINE, steps, notes=notes)


def take_back(connection: Connection, store: Store, name: str) -> tuple[Finding, ...]:
    """Remove what there is of a new domain with this name or UUID; returns what that was."""
    require_writable(connection)

    def act(part: DomainStore, intent: Intent) -> Finding:
        _take_back(part, intent)
        return _finding(intent)

    return tuple(_each(connection, store, name, act))


def require_writable(connection: Connection) -> None:
    """Raises ReadOnlyConnection."""
    if connection.read_only:
        raise ReadOnlyConnection(
            f"the connection to {connection.uri} only allows reading",
            hint="open it for writing, which is without --readonly",
        )


def _each(
    connection: Connection,
    store: Store,
    name: str | None,
    act: Callable[[DomainStore, Intent], T],
) -> list[T]:
    """Do something, under its lock, with each domain that was being made and that libvirt does not
    know; name -- with those alone that were to be called so, or have this UUID.
    """
    done = []
    for key in store.domains():
        part = store.domain(key)
        intent = _intent(part)
        if intent is None or name not in (None, key, intent.data["domain"]):
            continue
        with suppress(Busy), part.lock(0):
            intent = _intent(part)
            if (
                intent is not None
                and intent.data["uri"] == connection.uri
                and is_known(connection, key) is False
            ):
                done.append(act(part, intent))
    return done


def _intent(part: DomainStore) -> Intent | None:
    with suppress(StoreDamaged, StoreFailed):
        intent = part.read_intent()
        if intent is not None and intent.operation == OPERATION:
            return intent
    return None


def is_known(connection: Connection, uuid: str) -> bool | None:
    """Whether libvirt knows the domain; None where that cannot be told."""
    try:
        connection.lookup(uuid)
    except NoDomain:
        return False
    except CkptmgrError:
        return None
    return True


def _finding(intent: Intent) -> Finding:
    return Finding(
        "intent",
        f"a restore of point {intent.names[0]} to a new domain {intent.data['domain']} was "
        "interrupted before libvirt knew that domain",
        "what was written for it is removed; then it can be restored again",
        action=Settle(),
    )


def _remains(intent: Intent) -> Remains:
    data = intent.data
    paths = [path for path in map(Path, data["temporaries"]) if temporaries.NAME.match(path.name)]
    notes = []
    for name, identity in data["files"].items():
        with suppress(OSError):
            if identity_of(Path(name)) != identity:
                notes.append(f"{name} stays: it is not what was written")
            elif name in data["replaced"]:
                notes.append(f"{name} is replaced: what it held is gone")
            else:
                paths.append(Path(name))
    notes += [f"{name} may be half written: what it held is gone" for name in data["volumes"]]
    tree = Path(data["tpm"]) if data["tpm"] is not None and Path(data["tpm"]).is_dir() else None
    folders = tuple(map(Path, data["folders"]))
    return Remains(
        tuple(path for path in paths if os.path.lexists(path)), tree, folders, tuple(notes)
    )


def _take_back(part: DomainStore, intent: Intent) -> None:
    log.warning(
        "taking back an interrupted restore of point %s: domain %s was not defined",
        intent.names[0],
        intent.data["domain"],
    )
    remains = _remains(intent)
    for note in remains.notes:
        log.warning("%s", note)
    for path in remains.files:
        files.remove(path, sync=False)
    if remains.tree is not None:
        files.remove_tree(remains.tree)
    for folder in remains.folders:
        with suppress(OSError):
            folder.rmdir()
    part.clear_intent()
    part.remove_unused()
