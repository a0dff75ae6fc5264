"""One domain, its store and its engines, for the length of one use case."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import EngineName
from ..config import Settings
from ..domain.adapter import DomainAdapter
from ..domain.disk import Disk, DiskLayers
from ..domain.marker import Marker
from ..engine.choice import Choice, Stack, choose
from ..errors import OperationFailed, ReadOnlyConnection, Unsupported
from ..history import History
from ..store import DomainRecord, DomainStore, Loaded
from ..views import DomainView

if TYPE_CHECKING:
    from ..engine.base import Engine

log = logging.getLogger("ckptmgr")


@dataclass(frozen=True)
class Workspace:
    """Where QEMU may make a socket and scratch files, all called `prefix` and something.

    They lie in one folder without subfolders: AppArmor lets QEMU write just there.  `folder` is
    None where there is none: the domain does not run, or runs on another machine.
    """

    folder: Path | None
    prefix: str

    @property
    def socket(self) -> str | None:
        """Path of the NBD server's unix socket."""
        return None if self.folder is None else str(self.folder / f"{self.prefix}.sock")

    def scratch(self, target: str) -> str | None:
        """Path of the scratch file of a disk's backup."""
        if self.folder is None:
            return None
        return str(self.folder / f"{self.prefix}-{target}.scratch")

    def files(self) -> tuple[Path, ...]:
        """What is there: while nothing is under way, an interrupted operation left it."""
        if self.folder is None:
            return ()
        found = self.folder.glob(f"{self.prefix}*")
        return tuple(sorted(path for path in found if path.suffix in (".sock", ".scratch")))

    def clear(self) -> None:
        """Remove what is there.  Raises Unsupported where the folder cannot be used."""
        try:
            for path in self.files():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise Unsupported(
                f"{self.folder}, where dirty bitmaps are read through a socket, cannot be used: "
                f"{error.strerror}",
                hint="run as the user of the hypervisor, or set socket_directory in ckptmgr.toml",
            ) from error


class Session:
    """What every use case needs to know, looked up once.

    asked -- the engine that the user wants; None: the one that fits
    """

    def __init__(
        self,
        adapter: DomainAdapter,
        store: DomainStore,
        settings: Settings,
        asked: EngineName | None,
    ) -> None:
        self.adapter = adapter
        self.store = store
        self.settings = settings
        self.asked = asked

    @property
    def view(self) -> DomainView:
        """Name and UUID of the domain."""
        return DomainView(self.adapter.name, self.adapter.uuid)

    @cached_property
    def active(self) -> bool:
        """Whether the domain runs."""
        return self.adapter.active()

    @cached_property
    def disks(self) -> tuple[Disk, ...]:
        """The domain's disks."""
        return self.adapter.disks()

    @cached_property
    def backup(self) -> tuple[bool, str]:
        """Whether libvirt's checkpoint and backup APIs work for this domain, and why."""
        return self.adapter.backup_support()

    @cached_property
    def stack(self) -> Stack:
        """What the choice of an engine rests on."""
        works, reason = self.backup
        return Stack(self.adapter.name, self.active, self.adapter.connection.local, works, reason)

    @cached_property
    def choice(self) -> Choice:
        """The engine that works here.  Raises Unsupported if the one asked for cannot."""
        choice = choose(self.asked, self.stack)
        log.info("engine %s: %s", choice.engine, choice.reason)
        return choice

    @property
    def tells_libvirt(self) -> bool:
        """Whether libvirt is told of checkpoints that another engine makes.

        Not where it could not use them: there it would only refuse snapshots and block jobs
        because of them (libvirt 7.0, "cannot perform block operations while checkpoint exists").
        """
        return self.backup[0]

    def engine(self, name: EngineName) -> Engine:
        """The engine called `name`, for this domain."""
        # Each engine brings its own libraries; most commands need one of them, or none.
        if name is EngineName.LIBVIRT:
            from ..engine.libvirt import LibvirtEngine

            return LibvirtEngine(self.adapter)
        if name is EngineName.MONITOR:
            from ..engine.monitor import MonitorEngine

            return MonitorEngine(self.adapter)
        from ..engine.offline import OfflineEngine

        return OfflineEngine(self.adapter)

    def renewed(self) -> Session:
        """The same domain, with nothing looked up yet."""
        return Session(self.adapter, self.store, self.settings, self.asked)

    def loaded(self) -> Loaded:
        """What the store has; if its record of the current checkpoint is lost, by the marker."""
        loaded = self.store.load()
        if loaded.record.name or not loaded.history.checkpoints:
            return loaded
        marker = self.adapter.marker()
        if marker is None or marker.checkpoint not in loaded.history.checkpoints:
            return loaded
        record = DomainRecord(self.adapter.name, marker.checkpoint, marker.generation)
        history = replace(loaded.history, current=marker.checkpoint)
        return replace(loaded, history=history, record=record)

    def history(self) -> History:
        """The history as recorded.  Damaged documents are reported, and left alone."""
        loaded = self.loaded()
        for damage in loaded.damaged:
            log.warning("%s", damage.message)
        return loaded.history

    def definition(self) -> str:
        """The domain as it will be at its next start; with its secrets, the store being private."""
        return self.adapter.definition(secure=True)

    def layers(self, engine: EngineName) -> dict[str, DiskLayers]:
        """The bitmaps on each disk's layers, as far as `engine` may look.

        The libvirt engine does not: only the monitor tells, and using it taints the domain.
        """
        if engine is EngineName.LIBVIRT:
            return {}
        return {found.target: found for found in self.adapter.layers()}

    def place(self) -> Workspace:
        """Where a socket and scratch files would be made; nothing is touched."""
        own = self.settings.socket_directory
        if own is not None:
            return Workspace(own, self.adapter.uuid)
        if not self.active:
            return Workspace(None, "ckptmgr")
        try:
            return Workspace(self.adapter.runtime_directory(), "ckptmgr")
        except Unsupported as error:
            log.info("%s", error)
            return Workspace(None, "ckptmgr")

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Names for a socket and scratch files of QEMU's; what is left of them is removed.

        To be used under the domain's lock, since the names are always the same.
        """
        space = self.place()
        space.clear()
        try:
            yield space
        finally:
            space.clear()

    def require_writable(self) -> None:
        """Raises ReadOnlyConnection where nothing can be changed."""
        if self.adapter.connection.read_only:
            raise ReadOnlyConnection(
                f"the connection to {self.adapter.connection.uri} only allows reading"
            )

    @contextmanager
    def locked(self) -> Iterator[Loaded]:
        """Hold the domain's lock; what an interrupted operation left behind is settled first."""
        from .recovery import settle

        self.require_writable()
        with self.store.lock(self.settings.lock_timeout):
            settle(self)
            yield self.loaded()

    def commit_current(self, history: History, record: DomainRecord) -> DomainRecord:
        """Record which checkpoint is current, in the store and then in the domain's marker.

        A marker that cannot be set is no reason to fail: the store is the truth.
        """
        generation = record.generation + 1
        record = DomainRecord(self.adapter.name, history.current, generation)
        self.store.save_record(record)
        try:
            self.adapter.set_marker(
                None if history.current is None else Marker(history.current, generation)
            )
        except (OperationFailed, Unsupported) as error:
            log.warning("the marker of domain %s could not be set: %s", self.adapter.name, error)
        return record
