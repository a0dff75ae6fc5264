"""One domain's folder in the store.

    domain.json        DomainRecord
    <checkpoint>.xml   the checkpoint's document, sealed
    maps/<sha256>.map  dirty maps, named by the digest of the file
    intent.json        Intent
    lock               see lock.py

Readers take no lock: each file is always whole, and writers change them in an order in which
what is named is there before its name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint, check_name
from ..document import format_store, parse_sealed
from ..errors import InvalidDocument, InvalidRequest, StoreDamaged, StoreFailed
from ..history import History
from . import files, lock, seal
from .records import DomainRecord, Intent

if TYPE_CHECKING:
    from ..dirtymap import DirtyMap

RECORD = "domain.json"
"""Name of the file that holds the DomainRecord."""

INTENT = "intent.json"
"""Name of the file that holds the Intent."""

LOCK = "lock"
"""Name of the lock file."""

ASIDE = ".damaged"
"""Ends the names of files that were moved aside."""

_DOCUMENT = ".xml"
_MAP = ".map"
_MAP_NAME = re.compile(r"[0-9a-f]{64}\.map")


@dataclass(frozen=True)
class Damage:
    """A file that cannot be used.  It is left as it is.

    message -- what is wrong, for people: a sentence that begins with the path
    """

    path: Path
    message: str


@dataclass(frozen=True)
class Loaded:
    """What the store knows of a domain.

    damaged -- files that cost their checkpoint, or for domain.json the current one
    """

    history: History
    damaged: tuple[Damage, ...]
    record: DomainRecord

    @property
    def damaged_names(self) -> frozenset[str]:
        """Names taken by documents that cannot be used."""
        documents = (damage.path for damage in self.damaged)
        return frozenset(path.stem for path in documents if path.suffix == _DOCUMENT)


class DomainStore:
    """What the store has of one domain.

    Nothing is made on disk before something is written.  All that writes needs `lock`
    (RuntimeError otherwise), and raises StoreFailed with what was there intact.
    """

    def __init__(self, path: Path, uuid: str) -> None:
        self.path = path
        self.uuid = uuid
        self._locked = False
        self._read: dict[str, tuple[files.Stamp, Checkpoint]] = {}

    @contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Keep other writers away; wait for them up to `timeout` seconds, 0 to try once.

        Not re-entrant.  Raises Busy, and StoreFailed.
        """
        files.make_folder(self.path)
        files.is_folder(self.path)
        with lock.held(self.path / LOCK, timeout, "its history"):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    # --- reading -----------------------------------------------------------------------------

    def load(self, *, afresh: bool = False) -> Loaded:
        """All checkpoints that can be read, and what cannot.  Raises StoreFailed.

        afresh -- read all documents; or else only those that changed since this object read them
        """
        if afresh:
            self._read.clear()
        damaged: list[Damage] = []
        checkpoints: dict[str, Checkpoint] = {}
        # First the record: the document of what it names is written before, removed after it.
        record = self._load_record(damaged)
        for name in self._names(self.path):
            if not name.endswith(_DOCUMENT) or name.startswith("."):
                continue
            try:
                checkpoint = self._load_unless_read(name)
            except FileNotFoundError:
                continue  # removed since the folder was listed
            except (StoreDamaged, InvalidDocument) as error:
                damaged.append(self._damage(name, error.message))
            except OSError as error:
                damaged.append(self._damage(name, f"it cannot be read: {_reason(error)}"))
            else:
                checkpoints[checkpoint.name] = checkpoint
        current = record.current if record.current in checkpoints else None
        history = History(checkpoints, current)
        damaged += [
            self._damage(name + _DOCUMENT, "its checkpoint is recorded as its own ancestor")
            for name in history.circular
        ]
        return Loaded(history, tuple(damaged), record)

    def record(self) -> DomainRecord:
        """What is recorded of the domain itself; an empty one where that cannot be read."""
        return self._load_record([])

    def read_map(self, digest: str) -> DirtyMap:
        """A dirty map.  Raises StoreDamaged where it is missing or damaged, and StoreFailed."""
        from ..dirtymap import DirtyMap  # most commands read none

        path = self._map_path(digest)
        with files.failing(path, "cannot be read"):
            try:
                data = files.read(path)
            except FileNotFoundError:
                raise StoreDamaged(f"the dirty map {path} is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreDamaged(f"the dirty map {path} is damaged: its name is not its digest")
        try:
            return DirtyMap.deserialize(data)
        except StoreDamaged as error:
            raise StoreDamaged(f"the dirty map {path} is damaged: {error.message}") from error

    def read_intent(self) -> Intent | None:
        """The operation that was under way, if one was.  Raises StoreDamaged, StoreFailed."""
        path = self.path / INTENT
        if not files.is_folder(self.path):
            return None
        with files.failing(path, "cannot be read"):
            try:
                return Intent.deserialize(files.read(path))
            except FileNotFoundError:
                return None
            except StoreDamaged as error:
                raise StoreDamaged(
                    f"{path}, the record of an interrupted operation, cannot be used: "
                    f"{error.message}",
                    hint="`ckptmgr repair` moves it aside; `ckptmgr check` then tells what it left",
                ) from error

    # --- writing -----------------------------------------------------------------------------

    def save_map(self, dirty: DirtyMap) -> str:
        """Keep a dirty map; returns its digest."""
        return self.save_maps((dirty,))[0]

    def save_maps(self, maps: Iterable[DirtyMap]) -> tuple[str, ...]:
        """Keep dirty maps; returns their digests, in the same order."""
        self._require_lock()
        folder = self.path / "maps"
        if not files.is_folder(folder):
            files.make_folder(folder)
        digests = []
        for dirty in maps:
            data = dirty.serialize()
            digest = hashlib.sha256(data).hexdigest()
            if not self._holds(self._map_path(digest), data):
                files.write(self._map_path(digest), data, sync=False)
            digests.append(digest)
        # Also for maps that were there: whoever wrote them may have died before this.
        files.sync_folder(folder)
        return tuple(digests)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint, or record it anew.

        Its maps must have been saved.  Raises StoreDamaged where the name is taken by a document
        that cannot be used, which stays as it is; InvalidRequest for what XML cannot hold.
        """
        self._require_lock()
        data = seal.seal(format_store(checkpoint))
        name = checkpoint.name + _DOCUMENT
        path = self.path / name
        with files.failing(path, "cannot be read"):
            try:
                self._load_checkpoint(name)
            except FileNotFoundError:
                pass
            except (StoreDamaged, InvalidDocument) as error:
                raise StoreDamaged(
                    self._damage(name, error.message).message,
                    hint="move the file away to use the name again",
                ) from error
        files.write(path, data)

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint's document, which may be missing."""
        self._require_lock()
        files.remove(self.path / (check_name(name) + _DOCUMENT))

    def save_record(self, record: DomainRecord) -> None:
        """Record the domain's name and current checkpoint."""
        self._require_lock()
        files.write(self.path / RECORD, record.serialize())

    def write_intent(self, intent: Intent) -> None:
        """Record an operation that is about to begin.

        When it fails, no intent is left, as far as the disk lets go of one.
        """
        self._require_lock()
        try:
            files.write(self.path / INTENT, intent.serialize())
        except StoreFailed:
            with suppress(StoreFailed):
                files.remove(self.path / INTENT)
            raise

    def clear_intent(self, *, sync: bool = True) -> None:
        """The operation is done, or taken back.

        Without `sync`, a power cut may bring the intent back until something else is written: for
        an operation that is recorded, so that completing it again finds nothing to do.
        """
        self._require_lock()
        files.remove(self.path / INTENT, sync=sync)

    def remove_unused(self) -> None:
        """Remove the folder of a domain of which nothing is recorded, as far as that can be."""
        self._require_lock()
        with suppress(OSError):
            if os.listdir(self.path) == [LOCK]:  # noqa: PTH208 -- names, not paths
                (self.path / LOCK).unlink()
                self.path.rmdir()

    def set_aside(self, path: Path) -> None:
        """Move a file that cannot be used out of the way; it stays beside, as ``….damaged``.

        Raises ValueError for a path that is not this domain's, and StoreFailed.
        """
        self._require_lock()
        if path.parent != self.path:
            raise ValueError(f"{path} is not a file of this domain")
        files.move(path, path.with_name(path.name + ASIDE))

    def aside(self) -> frozenset[str]:
        """Names of the checkpoints whose documents were moved aside and are not there again.

        Raises StoreFailed.
        """
        suffix = _DOCUMENT + ASIDE
        names = self._names(self.path)
        there = {name.removesuffix(_DOCUMENT) for name in names if name.endswith(_DOCUMENT)}
        return frozenset(
            name.removesuffix(suffix) for name in names if name.endswith(suffix)
        ) - frozenset(there)

    def sweep(self) -> tuple[Path, ...]:
        """Remove what crashes and deletions left behind; returns what was removed.

        That is temporary files, and the maps that no document names; maps stay as long as there
        is an intent or a damaged document, which may name them.
        """
        self._require_lock()
        maps = self.path / "maps"
        map_names = self._names(maps)
        unused = [
            folder / name
            for folder, names in ((self.path, self._names(self.path)), (maps, map_names))
            for name in names
            if files.TEMPORARY.fullmatch(name)
        ]
        loaded = self.load()
        if not loaded.damaged and not os.path.lexists(self.path / INTENT):
            used = {
                f"{disk.interval.map}{_MAP}"
                for checkpoint in loaded.history.checkpoints.values()
                for disk in checkpoint.disks
                if disk.interval is not None
            } | {
                f"{digest}{_MAP}"
                for disks in loaded.record.tails.values()
                for digest in disks.values()
            }
            unused += [
                maps / name for name in map_names if _MAP_NAME.fullmatch(name) and name not in used
            ]
        for path in unused:
            files.remove(path, sync=False)  # what comes back is swept again
        return tuple(unused)

    # --- how ---------------------------------------------------------------------------------

    def _require_lock(self) -> None:
        if not self._locked:
            raise RuntimeError("the store is only changed under its lock")

    def _names(self, folder: Path) -> list[str]:
        """The names in a folder, none if it is not there."""
        if not files.is_folder(folder):
            return []
        with files.failing(folder, "cannot be read"):
            return sorted(os.listdir(folder))  # noqa: PTH208 -- names, not paths

    def _map_path(self, digest: str) -> Path:
        name = digest + _MAP
        if not _MAP_NAME.fullmatch(name):
            raise ValueError(f"{digest!r} is not the digest of a dirty map")
        return self.path / "maps" / name

    def _holds(self, path: Path, data: bytes) -> bool:
        """Whether `path` is there with just this content."""
        try:
            return files.read(path) == data
        except (OSError, StoreDamaged):
            return False

    def _load_unless_read(self, name: str) -> Checkpoint:
        """`_load_checkpoint`, or what it gave when the document was the same file.

        A history is long, and a command changes a document or two of it.
        """
        stamp = files.stamp(f"{self.path}/{name}")
        if name in self._read and self._read[name][0] == stamp:
            return self._read[name][1]
        self._read.pop(name, None)
        checkpoint = self._load_checkpoint(name)
        if stamp is not None:
            self._read[name] = stamp, checkpoint
        return checkpoint

    def _load_checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint in the document `name`.

        Raises StoreDamaged, InvalidDocument, and OSError of the reading.
        """
        stem = name.removesuffix(_DOCUMENT)
        try:
            check_name(stem)
        except InvalidRequest:
            raise StoreDamaged("its name is not that of a checkpoint") from None
        text = seal.unseal(files.read(self.path / name))
        checkpoint = parse_sealed(text, what="the document")
        if checkpoint.name != stem:
            raise StoreDamaged(f"it is the document of another checkpoint, {checkpoint.name}")
        return checkpoint

    def _load_record(self, damaged: list[Damage]) -> DomainRecord:
        name = RECORD
        if not files.is_folder(self.path):
            return DomainRecord()
        try:
            return DomainRecord.deserialize(files.read(self.path / name))
        except FileNotFoundError:
            return DomainRecord()
        except StoreDamaged as error:
            damaged.append(self._damage(name, error.message))
        except OSError as error:
            damaged.append(self._damage(name, f"it cannot be read: {_reason(error)}"))
        return DomainRecord()

    def _damage(self, name: str, message: str) -> Damage:
        path = self.path / name
        return Damage(path, f"{path}: {message}")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
