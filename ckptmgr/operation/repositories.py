"""The repositories in which a domain is known to have restore points.

A repository is often on a file system of its own.  While that is not mounted there is an empty
folder in its place, or none, and a backup would begin a new repository there: on the wrong disk,
and unnoticed until somebody wants to restore.  So the store knows where there were points.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..backup.repository import Lineage, Repository
from ..errors import RepositoryFailed, StoreFailed
from ..store import Store
from .session import Session

log = logging.getLogger("ckptmgr")


def require_known(session: Session, repository: Repository) -> None:
    """Refuse a folder without points where there were some: of this domain, or of others and there
    are none of anybody now.

    Raises RepositoryFailed, before anything is touched.
    """
    known = session.store.record().repositories
    keys = {known[name] for name in _names(repository) if name in known}
    if keys:
        if not any(_has_points(repository.lineage(key)) for key in keys):
            raise _gone(repository, f"domain {session.adapter.name!r}")
        return
    if repository.path.is_dir() and any(map(_has_points, repository.lineages())):
        return
    if (other := _of_another(session, repository)) is not None:
        raise _gone(repository, f"domain {other!r}")


def note(session: Session, repository: Repository, lineage: Lineage) -> None:
    """Record that there is a point of the domain; under the domain's lock."""
    now = dict.fromkeys(_names(repository), lineage.key)
    record = session.store.record()
    if now.items() <= record.repositories.items():
        return
    try:
        session.store.save_record(replace(record, repositories={**record.repositories, **now}))
    except StoreFailed as error:
        log.warning("it is not recorded that %s has restore points: %s", repository.path, error)


def _names(repository: Repository) -> Iterable[str]:
    """What the folder is called: as it was asked for, and without symbolic links."""
    path = os.path.normpath(repository.path)
    return dict.fromkeys((path, os.path.realpath(path)))


def _has_points(lineage: Lineage) -> bool:
    """Whether there is any, damaged or not."""
    return any(
        not name.startswith(".") and (lineage.path / name).is_dir() for name in lineage.names()
    )


def _of_another(session: Session, repository: Repository) -> str | None:
    """The name of another domain that had points there."""
    store = Store(session.store.path.parent)
    for uuid in store.domains():
        if uuid == session.adapter.uuid:
            continue
        record = store.domain(uuid).record()
        if _is_known(record.repositories, repository):
            return record.name or uuid
    return None


def _is_known(known: Mapping[str, str], repository: Repository) -> bool:
    return any(name in known for name in _names(repository))


def _gone(repository: Repository, whose: str) -> RepositoryFailed:
    return RepositoryFailed(
        f"the repository {repository.path} had restore points of {whose}, and there are none now",
        hint="is its file system mounted? To begin a new repository there, use --new",
    )
