"""A repository: a folder per lineage with a folder per restore point.

    REPO/<uuid>/             a lineage: the points of one domain, and of what was restored from them
        lock                 see store/lock.py
        prune.json           a change of a point under way, see rewriting.py
        <point>/
            manifest.json    manifest.py; written last
            vda.qcow2, vda.digests, domain.xml, ...
        .<point>.<16 hex>.partial      a point that is being made
        .<point>.gone                  one that is being removed

What is durable when: `Draft.commit` makes the files durable, then the manifest, and then renames
the folder; a point exists from that rename on.  Readers take no lock and write nothing, so a
repository on a read-only file system can be read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import uuid as uuids
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import check_name
from ..errors import InvalidRequest, PointExists, RepositoryDamaged, RepositoryFailed
from ..store import files, lock
from . import rewriting
from .failure import failing, of_the_repository
from .manifest import Manifest, PointDisk, PointFile, format_manifest, parse_manifest
from .points import Points

MANIFEST = "manifest.json"
"""Name of the file that holds the Manifest."""

LOCK = "lock"
"""Name of the lock file of a lineage."""

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")
"""Names of folders of points that are being made."""

GONE = re.compile(r"\.(.+)\.gone")
"""Names of folders of points that are being removed."""

_TRIES = 10

_MANIFEST_MAX = 1 << 24  # bytes; ours has some hundred per disk


@dataclass(frozen=True)
class Damage:
    """Something in a lineage that cannot be used.  It is left as it is.

    point -- the name of the point that it costs; None: none
    message -- for people: a sentence that begins with the path
    """

    path: Path
    point: str | None
    message: str


@dataclass(frozen=True)
class Loaded:
    """What a lineage holds."""

    points: Points
    damaged: tuple[Damage, ...]


class Repository:
    """The repository at `path`.  Nothing is made before `make`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def make(self) -> None:
        """Make the folder, of mode 0700, if it is not there.  Raises RepositoryFailed."""
        with of_the_repository():
            files.make_folder(self.path)
        self.require()

    def require(self) -> None:
        """See that there is a folder.  Raises RepositoryFailed."""
        with failing(self.path, "cannot be read"):
            try:
                there = stat.S_ISDIR(self.path.stat().st_mode)
            except FileNotFoundError:
                raise RepositoryFailed(
                    f"there is no repository {self.path}",
                    hint="is its file system mounted? `ckptmgr backup` makes a new one",
                ) from None
        if not there:
            raise RepositoryFailed(f"{self.path} is not a folder")

    def lineages(self) -> tuple[Lineage, ...]:
        """All lineages, by key.  Raises RepositoryFailed."""
        self.require()
        with failing(self.path, "cannot be read"):
            names = sorted(os.listdir(self.path))  # noqa: PTH208 -- names, not paths
        return tuple(
            Lineage(self.path / name, name)
            for name in names
            if _is_uuid(name) and _is_folder(self.path / name)
        )

    def lineage(self, key: str) -> Lineage:
        """The lineage that began with the domain of UUID `key`, known or not.

        Raises InvalidRequest for what is no UUID.
        """
        if not _is_uuid(key):
            raise InvalidRequest(f"{key!r} is not the UUID of a domain")
        return Lineage(self.path / key, key)

    def find(self, domain: str) -> tuple[Lineage, ...]:
        """The lineages that hold points of the domain with that name or UUID.

        Raises RepositoryFailed.
        """
        return tuple(each for each in self.lineages() if each.load().points.of(domain))


class Lineage:
    """The points of one domain, and of the domains that were restored from them.

    All that writes needs `lock` (RuntimeError otherwise).
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._locked = False

    @contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Keep other writers away; wait for them up to `timeout` seconds, 0 to try once.

        Makes the folder if it is not there.  Not re-entrant.  Raises Busy, RepositoryFailed.
        """
        with ExitStack() as stack:
            with of_the_repository():
                files.make_folder(self.path)
                if not _is_folder(self.path):
                    raise RepositoryFailed(f"{self.path} is not a folder", hint="move it away")
                what = f"the repository's part {self.key}"
                stack.enter_context(lock.held(self.path / LOCK, timeout, what))
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def require(self) -> None:
        """See that the folder is there, with anything in it.

        Raises RepositoryFailed: the file system may have been taken away under our hands.
        """
        if not self.names():
            raise RepositoryFailed(
                f"{self.path} is not there any more",
                hint="is the file system of the repository mounted?",
            )

    def load(self) -> Loaded:
        """All points that can be read, and what cannot.  Raises RepositoryFailed.

        What another process changes meanwhile is seen as it was before or after.
        """
        found = self._load()
        for _ in range(_TRIES):
            points = found.points
            if not found.damaged and not any(map(points.broken, points.manifests)):
                break
            # Damage, or a change that is under way: then it is another one when looked at again.
            again = self._load()
            if again == found:
                break
            found = again
        return found

    def _load(self) -> Loaded:
        manifests: dict[str, Manifest] = {}
        damaged: list[Damage] = []
        under_way = None
        try:
            under_way = rewriting.read(self.path)
        except RepositoryDamaged as error:
            damaged.append(Damage(self.path / rewriting.RECORD, None, error.message))
        for name in self.names():
            if name.startswith(".") or not _is_folder(self.path / name):
                continue
            path = self.path / name / MANIFEST
            try:
                manifests[name] = self._manifest(name)
            except RepositoryDamaged as error:
                if _is_folder(path.parent):  # else it was removed since the folder was listed
                    damaged.append(Damage(path, name, f"{path}: {error.message}"))
        if under_way is not None and under_way.point in manifests:
            changing = manifests[under_way.point]
            manifests[under_way.point] = rewriting.seen(self.path, under_way, changing)
        return Loaded(Points(manifests), tuple(damaged))

    def image(self, point: Manifest, disk: str) -> Path:
        """The image of a disk of a point.  Raises NoPoint if the point does not have it."""
        return self.path / point.name / _disk(point, disk).file

    def digests(self, point: Manifest, disk: str) -> Path:
        """The file of the digests of the blocks that this image holds.  Raises NoPoint."""
        return self.path / point.name / _disk(point, disk).digests

    def read(self, point: Manifest, file: PointFile) -> bytes:
        """The content of one of the point's files beside the disks, checked.

        Raises RepositoryDamaged, RepositoryFailed.
        """
        path = self.path / point.name / file.file
        with failing(path, "cannot be read"):
            try:
                data = files.read(path)
            except FileNotFoundError:
                raise RepositoryDamaged(f"{path} is missing") from None
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise RepositoryDamaged(f"{path} is damaged: it is not what the manifest says")
        return data

    def names(self) -> tuple[str, ...]:
        """The names in the lineage's folder.  Raises RepositoryFailed."""
        with failing(self.path, "cannot be read"):
            try:
                return tuple(sorted(os.listdir(self.path)))  # noqa: PTH208 -- names, not paths
            except FileNotFoundError:
                return ()

    # --- writing -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Complete a change that was interrupted, and clear away what is left of points that were
        being made or removed.

        Raises RepositoryFailed, and RepositoryDamaged if the record of a change cannot be read.
        """
        self.require_lock()
        under_way = rewriting.read(self.path)
        if under_way is not None:
            rewriting.complete(self.path, under_way, MANIFEST)
        with of_the_repository():
            for name in self.names():
                path = self.path / name
                if files.TEMPORARY.fullmatch(name):
                    files.remove(path, sync=False)
                elif (PARTIAL.fullmatch(name) or GONE.fullmatch(name)) and _is_folder(path):
                    files.remove_tree(path)  # what comes back is cleared away again
        for name, manifest in self.load().points.manifests.items():
            rewriting.sweep(self.path / name, manifest)

    def remove(self, name: str) -> None:
        """Remove a point on which nothing stands any more.  Raises RepositoryFailed."""
        self.require_lock()
        gone = self.path / f".{check_name(name)}.gone"
        with of_the_repository():
            files.move(self.path / name, gone)
            files.remove_tree(gone)  # what comes back is cleared away by `settle`

    def draft(self, name: str) -> Draft:
        """Begin a point.  Raises InvalidRequest, PointExists, RepositoryFailed."""
        self.require_lock()
        check_name(name)
        if os.path.lexists(self.path / name):
            raise PointExists(
                f"there is a restore point {name} already", hint="choose another name"
            )
        return Draft(self, name)

    def require_lock(self) -> None:
        """Raises RuntimeError without the lock."""
        if not self._locked:
            raise RuntimeError("a repository is only changed under its lock")

    # --- how ---------------------------------------------------------------------------------

    def _manifest(self, name: str) -> Manifest:
        """The manifest of the point `name`.  Raises RepositoryDamaged."""
        try:
            check_name(name)
        except InvalidRequest:
            raise RepositoryDamaged(
                "its folder does not have the name of a restore point"
            ) from None
        path = self.path / name / MANIFEST
        try:
            if path.lstat().st_size > _MANIFEST_MAX:
                raise RepositoryDamaged("it is too large for a manifest")
            with of_the_repository():
                manifest = parse_manifest(files.read(path))
        except (FileNotFoundError, NotADirectoryError):
            raise RepositoryDamaged("it is missing") from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise RepositoryDamaged(f"it cannot be read: {reason}") from error
        if manifest.name != name:
            raise RepositoryDamaged(f"it is the manifest of another point, {manifest.name}")
        return manifest


class Draft:
    """A point that is being made; it exists once `commit` has returned.

    folder -- where its files are written
    """

    def __init__(self, lineage: Lineage, name: str) -> None:
        self.name = name
        self._lineage = lineage
        self._moving = False
        self.folder = lineage.path / f".{name}.{os.urandom(8).hex()}.partial"
        try:
            with of_the_repository():
                files.make_folder(self.folder)
        except BaseException:
            self.abandon()
            raise

    def path(self, file: str) -> Path:
        """Where the file of that name belongs."""
        return self.folder / file

    def write(self, role: str, file: str, data: bytes, source: str | None = None) -> PointFile:
        """Keep a file beside the disks; returns what the manifest says of it.

        Raises RepositoryFailed.
        """
        with of_the_repository():
            files.write(self.path(file), data, sync=False)
        return PointFile(role, file, source, len(data), hashlib.sha256(data).hexdigest())

    def commit(self, manifest: Manifest) -> None:
        """Make the files durable, then the manifest, then the point.

        Raises RepositoryFailed, also where a file is not there any more, and ValueError for a
        manifest that is not of this point.
        """
        self._lineage.require_lock()
        if manifest.name != self.name:
            raise ValueError(f"this is the draft of {self.name}, not of {manifest.name}")
        data = format_manifest(manifest)
        with of_the_repository():
            for name in sorted(manifest.file_names):
                files.sync_file(self.path(name))
            files.write(self.path(MANIFEST), data)
            self._moving = True
            files.move(self.folder, self._lineage.path / self.name)

    def abandon(self) -> None:
        """Remove what there is of it; failures do not matter, `Lineage.settle` tries again."""
        with suppress(RepositoryFailed), of_the_repository():
            if _is_folder(self.folder):
                files.remove_tree(self.folder)

    def withdraw(self) -> None:
        """Take back what `commit` has done, whether it has returned or failed.

        The draft is as it was before, if it is not gone; failures do not matter: then the point
        stays, and it is a whole one.
        """
        self._lineage.require_lock()
        if self._moving and not _is_folder(self.folder):
            with suppress(RepositoryFailed), of_the_repository():
                files.move(self._lineage.path / self.name, self.folder)


def _disk(point: Manifest, name: str) -> PointDisk:
    return Points({point.name: point}).disk(point.name, name)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuids.UUID(text)) == text
    except ValueError:
        return False


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder and no link to one; what cannot be told counts as none."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
