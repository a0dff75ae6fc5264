"""Files that are being restored: their names until all are written, and what a kill leaves of them.

    .vda.qcow2.<16 hex>.restoring       the same digits for all files of one restore

When all of them are durable, each gets its name as a second one, by a hard link; then the first
names go.  So whoever finds temporary names knows what they are: if one of their files has its name,
all of them are whole, and the others get theirs, too; if none has, they are removed.  Whoever
writes has the folder locked (flock, shared), so that what is under way is never taken for what is
left.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

log = logging.getLogger("ckptmgr")

NAME = re.compile(r"\.(.+)\.([0-9a-f]{16})\.restoring")
"""Names of files that are being written."""

_PATIENCE = 5.0
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def new_token() -> str:
    """What the temporary names of one restore have in common."""
    return os.urandom(8).hex()


def temporary(path: Path, token: str) -> Path:
    """The name that the file `path` has until it is whole."""
    return path.with_name(f".{path.name}.{token}.restoring")


@contextmanager
def writing(paths: Iterable[Path]) -> Iterator[None]:
    """Have the folders of `paths` known as ones that are written to.

    What a restore to these names has left that was killed is settled first, unless somebody else is
    writing there just now.  Raises OSError.
    """
    with ExitStack() as stack:
        folders: dict[Path, set[str]] = {}
        for path in paths:
            folders.setdefault(path.parent, set()).add(path.name)
        for folder, names in folders.items():
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            if _lock(descriptor, fcntl.LOCK_EX):
                settle(folder, names)
            _share(descriptor)
        yield


def settle(folder: Path, names: Iterable[str]) -> None:
    """Complete or remove what restores have left that wrote a file of one of these names."""
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for path in sorted(folder.iterdir()):
        if (found := NAME.fullmatch(path.name)) is not None:
            groups.setdefault(found[2], []).append((path, folder / found[1]))
    for group in groups.values():
        if {path.name for _, path in group}.isdisjoint(names):
            continue
        whole = any(_same(*each) for each in group)
        told = ", ".join(path.name for _, path in group)
        if whole:
            log.warning("completing an interrupted restore in %s: %s", folder, told)
        else:
            log.warning("removing what an interrupted restore has left in %s: %s", folder, told)
        for path, final in group:
            if whole and not os.path.lexists(final):
                _link(path, final)
        for path, _ in group:
            path.unlink(missing_ok=True)


def land(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Give files their names, which nothing else must have.

    pairs -- temporary and final name

    The temporary names stay where that can be.  Raises OSError; then none has its name.
    """
    moved: list[tuple[Path, Path]] = []
    try:
        for path, final in pairs:
            try:
                _link(path, final)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.lexists(final):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
                moved.append((path, final))
                path.rename(final)
    except BaseException:
        take_back(pairs)
        for path, final in moved:
            with suppress(OSError):
                if not path.exists():
                    final.unlink()
        raise


def take_back(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Take the names from files again that `land` has given to them; their temporary ones stay."""
    for path, final in pairs:
        with suppress(OSError):
            if _same(path, final):
                final.unlink()


def _link(path: Path, final: Path) -> None:
    os.link(path, final)


def _same(path: Path, final: Path) -> bool:
    try:
        return path.samefile(final)
    except OSError:
        return False


def _share(descriptor: int) -> None:
    """Have others see that the folder is written to, where it can be told."""
    deadline = time.monotonic() + _PATIENCE
    while not _lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            log.info("that is restored to the folder cannot be told to other processes")
            return
        time.sleep(0.01)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether it is locked; network file systems may have no such locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
