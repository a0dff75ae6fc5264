"""Writing the disks of a restore point to where they go.

New images are written under temporary names, made durable, and get their names all together when
every disk is there; whatever goes wrong before that leaves nothing behind.  Volumes come last.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from ..domain.devices import is_mounted
from ..engine.qemu_img import check_free
from ..errors import Busy, CkptmgrError, InvalidRequest, RepositoryFailed, RestoreFailed
from . import overlays, temporaries
from .extraction import Extraction, check_image, opened
from .manifest import Manifest
from .placement import Kind, Place
from .points import Points
from .qcow2 import Qcow2Writer
from .repository import Lineage
from .volume import NewFile, Volume

log = logging.getLogger("ckptmgr")

Announce = Callable[[Sequence[Path]], None]
"""Told the temporary names before anything is written under them."""

Progress = Callable[[str, int, int], None]
"""``(disk, done, of)``, in bytes that are read and written; zeroes cost nothing."""

_HINTS = {
    errno.ENOSPC: "free some space there, or restore to another place",
    errno.EDQUOT: "free some space within the quota, or restore to another place",
    errno.EACCES: "run as a user who may write there",
    errno.EPERM: "run as a user who may write there",
    errno.EBUSY: "it is in use: unmount it, or stop what uses it",
}


@dataclass(frozen=True)
class Staged:
    """A disk that is written.

    temporary -- its name until `install`; None: it is a volume
    bytes -- of data that were written
    """

    place: Place
    temporary: Path | None
    bytes: int


class Work:
    """Disks that are written.

    disks -- in the order in which they were asked for
    """

    def __init__(self, done: list[Staged], order: list[str]) -> None:
        self.disks = tuple(sorted(done, key=lambda each: order.index(each.place.disk)))
        self._done = done

    def keep(self) -> None:
        """Somebody else sees from now on to what has no name of its own."""
        self._done.clear()


@contextmanager
def staged(
    lineage: Lineage,
    manifest: Manifest,
    places: Sequence[Place],
    lock_timeout: float,
    *,
    token: str | None = None,
    announce: Announce = lambda names: None,
    progress: Progress = lambda disk, done, of: None,
) -> Iterator[Work]:
    """Write the disks in `places`; what has no name of its own when the block ends is removed.

    lock_timeout -- seconds to wait for another process that changes the points
    token -- of the temporary names

    Raises RepositoryDamaged, RepositoryFailed, RestoreFailed, InvalidRequest, Busy.
    """
    token = token or temporaries.new_token()
    names = {
        place.disk: temporaries.temporary(place.path, token)
        for place in places
        if place.kind is not Kind.VOLUME
    }
    with ExitStack() as stack:
        _begin_writing(stack, [place.path for place in places if place.disk in names])
        overlaid = any(each.kind is Kind.OVERLAY for each in places)
        if overlaid:
            # Until the overlays are there, nothing else says that the point is needed.
            stack.enter_context(_kept_still(lineage, lock_timeout, needed=True))
        sources = _opened(lineage, manifest, places, stack, None if overlaid else lock_timeout)
        announce(tuple(names.values()))
        done: list[Staged] = []
        stack.callback(_discard, done)
        for place in sorted(places, key=lambda place: place.kind is Kind.VOLUME):
            if place.kind is Kind.OVERLAY:
                done.append(_overlay(lineage, manifest, place, names[place.disk]))
            else:
                name = names.get(place.disk)
                done.append(_stage(sources[place.disk], place, name, progress))
        yield Work(done, [place.disk for place in places])


def _begin_writing(stack: ExitStack, paths: Sequence[Path]) -> None:
    with _failing("what is restored"):
        stack.enter_context(temporaries.writing(paths))


def _opened(
    lineage: Lineage,
    manifest: Manifest,
    places: Sequence[Place],
    stack: ExitStack,
    lock_timeout: float | None,
) -> dict[str, Extraction]:
    """Everything that is read, open: from then on it may be removed and is still there for us.

    lock_timeout -- None: the lock is held
    """
    with (
        nullcontext() if lock_timeout is None else _kept_still(lineage, lock_timeout, needed=False)
    ):
        points = lineage.load().points
        manifest = _same(points, manifest)
        check(lineage, points, manifest, places)
        new = [place.path for place in places if place.kind is Kind.OVERLAY]
        if new:
            overlays.record(lineage.path / manifest.name, new)
        return {
            place.disk: stack.enter_context(opened(lineage, points, manifest.name, place.disk))
            for place in places
            if place.kind is not Kind.OVERLAY
        }


def _same(points: Points, manifest: Manifest) -> Manifest:
    """The manifest as it is now; a point that was merged with others stays the same one."""
    found = points.get(manifest.name)
    if found.id != manifest.id:
        raise RepositoryFailed(f"restore point {manifest.name} was replaced just now")
    return found


@contextmanager
def _kept_still(lineage: Lineage, lock_timeout: float, *, needed: bool) -> Iterator[None]:
    """Keep others from changing the points, and complete what was interrupted.

    needed -- else, a repository that cannot be written stays as it is
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lineage.lock(lock_timeout))
            lineage.settle()
        except RepositoryFailed as error:
            if needed:
                error.hint = "an overlay is recorded in the repository; use --flatten"
                raise
            log.info("read without a lock: %s", error)
        yield


def _discard(done: Sequence[Staged]) -> None:
    for each in done:
        if each.temporary is not None:
            with suppress(OSError):
                each.temporary.unlink(missing_ok=True)


def install(staged: Sequence[Staged], beside: Sequence[tuple[Path, Path]] = ()) -> None:
    """Give the images their names, durably.

    beside -- temporary and final names of other files that come with them

    Raises RestoreFailed; then no new one has its name.
    """
    for each in staged:
        if each.temporary is not None and each.place.kind is not Kind.REPLACEMENT:
            with _writing(each.place):
                if os.path.lexists(each.place.path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    pairs = [*_new(staged), *beside]
    with _failing("what is restored"):
        temporaries.land(pairs)
    try:
        for each in staged:
            if each.temporary is not None and each.place.kind is Kind.REPLACEMENT:
                with _writing(each.place):
                    each.temporary.rename(each.place.path)
        sync_folders(final.parent for final in _final_names(staged, pairs))
    except BaseException:
        temporaries.take_back(pairs)
        raise


def uninstall(staged: Sequence[Staged], beside: Sequence[tuple[Path, Path]] = ()) -> None:
    """Take back what `install` did, but for images that it replaced."""
    temporaries.take_back([*_new(staged), *beside])


def _new(staged: Sequence[Staged]) -> Iterator[tuple[Path, Path]]:
    for each in staged:
        if each.temporary is not None and each.place.kind is not Kind.REPLACEMENT:
            yield each.temporary, each.place.path


def _final_names(staged: Sequence[Staged], pairs: Sequence[tuple[Path, Path]]) -> Iterator[Path]:
    for each in staged:
        if each.temporary is not None:
            yield each.place.path
    for _, final in pairs:
        yield final


def sync_folders(folders: Iterator[Path]) -> None:
    """Make the names in folders durable.  Raises RestoreFailed."""
    for folder in dict.fromkeys(folders):
        with _failing(f"the folder {folder}"):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check(lineage: Lineage, points: Points, manifest: Manifest, places: Sequence[Place]) -> None:
    """Refuse what can be refused before anything is written.

    Raises RepositoryDamaged, RepositoryFailed, InvalidRequest, Busy.
    """
    for place in places:
        _check(lineage, points, manifest, place)


def _check(lineage: Lineage, points: Points, manifest: Manifest, place: Place) -> None:
    for name in points.chain(manifest.name, place.disk):
        check_image(lineage, points, name, place.disk)
    if place.path.is_relative_to(lineage.path.parent.resolve()):
        raise InvalidRequest(
            f"{place.path} is in the repository", hint="restore to a place outside of it"
        )
    if place.kind in (Kind.REPLACEMENT, Kind.VOLUME):
        if place.block and is_mounted(place.path):
            raise Busy(
                f"{place.path}, for disk {place.disk}, is mounted, or is what another device is "
                "made of",
                hint=_HINTS[errno.EBUSY],
            )
        check_free(place.disk, str(place.path))
    elif os.path.lexists(place.path):
        raise InvalidRequest(
            f"{place.path} is there already",
            hint="name another folder, or write onto it: "
            f"--onto {place.disk}={place.path}, which it does not survive",
        )


def _stage(
    source: Extraction,
    place: Place,
    temporary: Path | None,
    progress: Progress,
) -> Staged:
    with _writing(place):
        sink = _sink(place, temporary)
    done = 0

    def step(length: int) -> None:
        nonlocal done
        done += length
        progress(place.disk, done, source.length)

    progress(place.disk, 0, source.length)
    try:
        with _writing(place):
            if isinstance(sink, Volume):
                sink.clear()
            source.copy(sink, progress=step)
            if temporary is not None and place.kind is Kind.REPLACEMENT:
                _take_after(temporary, place.path)
            sink.close()
    except BaseException as error:
        sink.abandon()
        if place.kind is Kind.VOLUME:
            _tell_half_written(place, error)
        raise
    return Staged(place, temporary, source.length)


def _sink(place: Place, temporary: Path | None) -> Qcow2Writer | NewFile | Volume:
    if temporary is None:
        return Volume(place.path, place.size)
    if place.format == "qcow2":
        return Qcow2Writer(temporary, place.size)
    return NewFile(temporary, place.size)


def _tell_half_written(place: Place, error: BaseException) -> None:
    """Have the error say in what state the volume is."""
    said = (
        f"{place.path} is half written: what it held is gone, disk {place.disk} is not whole, and "
        "the volume begins with words that say so"
    )
    if isinstance(error, CkptmgrError):
        error.message = f"{error.message}; {said}"
    else:
        log.warning("%s", said)


def _overlay(lineage: Lineage, manifest: Manifest, place: Place, temporary: Path) -> Staged:
    with _writing(place):
        image = lineage.image(manifest, place.disk).resolve()
        sink = Qcow2Writer(temporary, place.size, backing=str(image))
        try:
            sink.close()
        except BaseException:
            sink.abandon()
            raise
    return Staged(place, temporary, 0)


def _take_after(path: Path, other: Path) -> None:
    """Give `path` the owner, mode and security label of `other`."""
    like = other.stat()
    try:
        os.chown(path, like.st_uid, like.st_gid)
    except PermissionError:
        if os.geteuid() == 0:
            raise
    path.chmod(stat.S_IMODE(like.st_mode))
    with suppress(OSError):  # where there are none
        os.setxattr(path, "security.selinux", os.getxattr(other, "security.selinux"))


@contextmanager
def _writing(place: Place) -> Iterator[None]:
    with _failing(f"{place.path}, for disk {place.disk},"):
        yield


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        kind = Busy if number == errno.EBUSY else RestoreFailed
        raise kind(
            f"{what} cannot be written: {os.strerror(number)}", hint=_HINTS.get(number)
        ) from error
