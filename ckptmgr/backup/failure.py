"""Failures of files, said of the repository: store/files.py speaks of the store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RepositoryDamaged, RepositoryFailed, StoreDamaged, StoreFailed
from ..store import files

_HINTS = {
    errno.EACCES: "run as a user who may do that, or use another repository",
    errno.EPERM: "run as a user who may do that, or use another repository",
    errno.EROFS: "its file system is read-only: it can be read, verified and restored from",
    errno.ENOSPC: "free some space on its file system; `ckptmgr prune` lets points go",
    errno.EDQUOT: "free some space within the quota; `ckptmgr prune` lets points go",
    errno.EIO: "check the file system of the repository, and the log of the host's kernel; "
    "`ckptmgr verify` names all that is damaged",
    errno.ENOENT: "is the file system of the repository mounted?",
    errno.ESTALE: "is the file system of the repository mounted?",
}


@contextmanager
def of_the_repository() -> Iterator[None]:
    """Turn what store/files.py raises into RepositoryFailed and RepositoryDamaged."""
    try:
        yield
    except StoreFailed as error:
        cause = error.__cause__
        hint = error.hint
        if isinstance(cause, OSError):
            hint = _HINTS.get(cause.errno or 0, "check the file system of the repository")
        raise RepositoryFailed(error.message, hint=hint) from error
    except StoreDamaged as error:
        raise RepositoryDamaged(error.message) from error


@contextmanager
def failing(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError of what is done to `path` into RepositoryFailed, as files.failing."""
    with of_the_repository(), files.failing(path, what):
        yield
