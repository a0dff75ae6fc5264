"""The only module that changes the store's disk, and a repository's: a few whole-file operations.

What is durable when:

- `write` returns: the file has its new content, whatever happens.  Interrupted before that, it
  has all of the old or all of the new content, and maybe a temporary file lies beside it.
- `remove` and `make_folder` return: the name is gone, or there, whatever happens.
- `Output.close` returns: the file's content is certain; its name once the folder was synced.

Without `sync` that holds only after the next `sync_folder` of the folder, or `write` or `remove`
in it with `sync`; until then, a power cut may leave the name as it was.

The functions with an underscore are single system calls, for tests to record and to fail.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StoreDamaged, StoreFailed

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""Names of temporary files; no checkpoint's name starts with a dot."""

_READ_AT_ONCE = 1 << 18

_ELSEWHERE = "choose another directory with --store or CKPTMGR_STORE"
_HINTS = {
    errno.EACCES: f"run as the user that it belongs to, or {_ELSEWHERE}",
    errno.EPERM: f"run as the user that it belongs to, or {_ELSEWHERE}",
    errno.EROFS: f"its file system is read-only; {_ELSEWHERE}",
    errno.ENOSPC: f"free some space on its file system, or {_ELSEWHERE}",
    errno.EDQUOT: f"free some space within the quota, or {_ELSEWHERE}",
}


@contextmanager
def failing(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError of what is done to `path` into StoreFailed; `what`: "cannot be written"."""
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        raise StoreFailed(
            f"{path} {what}: {os.strerror(number)}",
            hint=_HINTS.get(number, f"check the file system of {path}"),
        ) from error


def write(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Give `path` the content `data`, mode 0600.  Raises StoreFailed."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    with failing(path, "cannot be written"):
        try:
            descriptor = _create(temporary)
            try:
                _write(descriptor, data)
                # Before the rename: file systems may order the two the other way round.
                _fsync(descriptor)
            finally:
                os.close(descriptor)
            _rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                _unlink(temporary)
            raise
    if sync:
        sync_folder(path.parent)


def remove(path: Path, *, sync: bool = True) -> None:
    """Remove a file that may be missing.  Raises StoreFailed."""
    with failing(path, "cannot be removed"), suppress(FileNotFoundError):
        _unlink(path)
    if sync:
        sync_folder(path.parent)


def move(old: Path, new: Path) -> None:
    """Give a file another name in its folder.  Raises StoreFailed."""
    with failing(old, "cannot be renamed"):
        _rename(old, new)
    sync_folder(new.parent)


class Output:
    """A new file, of mode 0600, that is written from front to back.  Raises StoreFailed.

    length -- bytes appended so far
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        with failing(path, "cannot be written"):
            self._descriptor: int | None = _create(path)

    def append(self, data: bytes | memoryview) -> None:
        """Write `data` behind what is there."""
        assert self._descriptor is not None, "it is closed"  # noqa: S101 -- a slip of ours
        with failing(self.path, "cannot be written"):
            _write(self._descriptor, data)
        self.length += len(data)

    def close(self) -> None:
        """Make the content durable."""
        assert self._descriptor is not None, "it is closed"  # noqa: S101 -- a slip of ours
        with failing(self.path, "cannot be written"):
            _fsync(self._descriptor)
        self._release()

    def abandon(self) -> None:
        """Remove the file, closed or not."""
        self._release()
        with suppress(OSError):
            _unlink(self.path)

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file that another program wrote durable.  Raises StoreFailed."""
    with failing(path, "cannot be written"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, following no link; nothing of that is durable yet.

    Raises StoreFailed.
    """
    with failing(folder, "cannot be removed"):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                _unlink(path)
        _rmdir(folder)


def make_folder(path: Path) -> None:
    """Make a folder of mode 0700, and those above it that are missing.  Raises StoreFailed."""
    missing = []
    above = path
    with failing(path, "cannot be made"):
        while not os.path.lexists(above):
            missing.append(above)
            above = above.parent
    for folder in reversed(missing):
        with failing(folder, "cannot be made"), suppress(FileExistsError):  # just now
            _mkdir(folder)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable.  Raises StoreFailed."""
    with failing(path, "cannot be written"):
        _fsync_folder(path)


def is_folder(path: Path) -> bool:
    """Whether the folder is there; anything else under its name is refused.

    A link could lead our files anywhere, and in a folder of somebody else's they are not ours.
    Raises StoreFailed.
    """
    with failing(path, "cannot be read"):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise StoreFailed(f"{path} is {kind}, not a folder", hint="move it away")
    if found.st_uid not in (0, os.geteuid()):
        raise StoreFailed(
            f"{path} belongs to another user (uid {found.st_uid})",
            hint=f"run as that user, or {_ELSEWHERE}",
        )
    return True


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file.

    Raises OSError, and StoreDamaged for anything else under that name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreDamaged(f"{path} is a symbolic link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreDamaged(f"{path} is not a regular file")
    return descriptor


Stamp = tuple[int, ...]
"""What tells one content of a file from another: its inode, size and times."""

_SETTLED = 1_000_000_000  # ns, many ticks of any file system's clock


def stamp(path: str) -> Stamp | None:
    """The stamp of a file; None if it changed so lately that it may change and keep its stamp.

    Raises OSError.
    """
    found = os.lstat(path)
    if time.time_ns() - found.st_ctime_ns < _SETTLED:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read(path: Path) -> bytes:
    """The content of a regular file.  Raises OSError, and StoreDamaged for anything else."""
    descriptor = open_regular(path)
    try:
        parts = []
        while part := os.read(descriptor, _READ_AT_ONCE):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A descriptor of the lock file, made if missing.  Raises StoreFailed."""
    with failing(path, "cannot be opened"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def write_holder(lock: int, holder: str) -> None:
    """Say in the lock file who holds it: for messages alone, so failures do not matter."""
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, holder.encode(), 0)


# --- system calls ----------------------------------------------------------------------------


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _rename(old: Path, new: Path) -> None:
    old.rename(new)


def _unlink(path: Path) -> None:
    path.unlink()


def _rmdir(path: Path) -> None:
    path.rmdir()


def _mkdir(path: Path) -> None:
    path.mkdir(mode=0o700)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
