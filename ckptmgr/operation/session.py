"""One domain, its store and its engines, for the length of one use case."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..branch import agrees
from ..checkpoint import EngineName
from ..config import Settings
from ..domain.adapter import DomainAdapter
from ..domain.disk import Disk, DiskLayers
from ..engine.choice import Choice, Stack, choose
from ..errors import (
    CkptmgrError,
    InvalidDocument,
    OperationFailed,
    ReadOnlyConnection,
    StoreFailed,
    Unsupported,
)
from ..history import History
from ..marker import Marker
from ..store import DomainRecord, DomainStore, Loaded
from ..views import DomainView
from .workspace import Workspace

if TYPE_CHECKING:
    from ..engine.base import Engine

log = logging.getLogger("ckptmgr")


class Session:
    """What every use case needs to know, looked up once.

    asked -- the engine that the user wants; None: the one that fits
    settled -- settles, under the lock, what an interrupted operation or another tool left behind
    """

    def __init__(
        self,
        adapter: DomainAdapter,
        store: DomainStore,
        settings: Settings,
        asked: EngineName | None,
        settled: Callable[[Session], Loaded],
    ) -> None:
        self.adapter = adapter
        self.store = store
        self.settings = settings
        self.asked = asked
        self._settled = settled

    @property
    def view(self) -> DomainView:
        """Name and UUID of the domain."""
        return DomainView(self.adapter.name, self.adapter.uuid)

    @cached_property
    def active(self) -> bool:
        """Whether the domain runs."""
        return self.adapter.active()

    @cached_property
    def _description(self) -> str:
        return self.adapter.description()

    @cached_property
    def disks(self) -> tuple[Disk, ...]:
        """The domain's disks."""
        return self.adapter.disks(self._description)

    @cached_property
    def backup(self) -> tuple[bool, str]:
        """Whether libvirt's checkpoint and backup APIs work for this domain, and why."""
        return self.adapter.backup_support(self._description)

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
        return Session(self.adapter, self.store, self.settings, self.asked, self._settled)

    def with_any_engine(self) -> Session:
        """The same domain, with the engine that fits, whichever was asked for."""
        return Session(self.adapter, self.store, self.settings, None, self._settled)

    def loaded(self) -> Loaded:
        """What the store has, with a current checkpoint; see `with_current`."""
        loaded = self.store.load()
        if not lost_current(loaded):
            return loaded
        return with_current(loaded, self.marker(), self.adapter.name)

    def marker(self) -> Marker | None:
        """The domain's marker; None, too, where there is something else in its place."""
        try:
            return self.adapter.marker()
        except InvalidDocument as error:
            log.warning("%s", error)
            return None

    def history(self) -> History:
        """The history as recorded.  Damaged documents are reported, and left alone."""
        loaded = self.loaded()
        for damage in loaded.damaged:
            log.warning("%s", damage.message)
        self._compare_marker(loaded)
        return loaded.history

    def _compare_marker(self, loaded: Loaded) -> None:
        marker = self.marker()
        if not agrees(marker, loaded.history, loaded.record):
            log.warning(
                "the marker of domain %s names checkpoint %s, and the store %s: the next command "
                "that changes something finds out what happened",
                self.adapter.name,
                None if marker is None else marker.checkpoint,
                loaded.history.current,
            )

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
        if not self.adapter.connection.local:
            return self._far_place()
        if own is not None:
            return Workspace(own, self.adapter.uuid)
        if not self.active:
            return Workspace(None, "ckptmgr")
        try:
            return Workspace(self.adapter.runtime_directory(), "ckptmgr")
        except Unsupported as error:
            log.info("%s", error)
            return Workspace(None, "ckptmgr")

    def _far_place(self) -> Workspace:
        """Where the settings allow a hypervisor elsewhere to serve bitmaps to us."""
        settings = self.settings
        if settings.nbd_address is None or not self.active:
            return Workspace(None, "ckptmgr")
        from ..plan.steps import TcpServer

        certificates = settings.nbd_certificates
        server = TcpServer(
            settings.nbd_address,
            settings.nbd_port,
            settings.nbd_tls,
            None if certificates is None else str(certificates),
        )
        # What a crash of that machine leaves we could not remove, and libvirt refuses a file that
        # is there: so the name is always another.
        prefix = f"ckptmgr-{self.adapter.uuid}-{time.time_ns():x}"
        return Workspace(None, prefix, server, settings.nbd_scratch)

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Names for a socket and scratch files of QEMU's; what is left of them is removed.

        To be used under the domain's lock, since the names are always the same.
        """
        space = self.place()
        self.release(space)
        try:
            yield space
        except BaseException:
            try:
                # Whatever could not be ended is known by its socket, so that goes last.
                self.release(space)
            except CkptmgrError as error:
                log.info("the next command clears away what is left: %s", error)
            raise
        space.clear()

    def release(self, space: Workspace) -> None:
        """End what an interrupted operation left running, and remove its files."""
        if space.server is not None and self.tells_libvirt:
            from ..plan.steps import BackupEnd

            self.engine(EngineName.LIBVIRT).run((BackupEnd(space.server),))
        if space.files() and space.socket is not None and self.active:
            from ..engine.monitor import listening
            from ..plan.steps import BackupEnd, NbdStop, ScratchRemove

            # Whoever was killed may have been QEMU's client until just now: asked first, it knows.
            listening(space.socket)
            self.engine(EngineName.LIBVIRT).run((BackupEnd(space.socket),))
            if listening(space.socket) or space.scratch_files():
                # Not libvirt's, whose job takes its files along: made through the monitor.
                self.engine(EngineName.MONITOR).run((NbdStop(space.socket), ScratchRemove()))
        space.clear()

    def require_writable(self) -> None:
        """Raises ReadOnlyConnection where nothing can be changed."""
        if self.adapter.connection.read_only:
            raise ReadOnlyConnection(
                f"the connection to {self.adapter.connection.uri} only allows reading",
                hint="open it for writing, which is without --readonly",
            )

    @contextmanager
    def locked(self) -> Iterator[Loaded]:
        """Hold the domain's lock; what an interrupted operation left behind is settled first."""
        self.require_writable()
        with self.store.lock(self.settings.lock_timeout):
            yield self._settled(self)

    def clear_intent(self) -> None:
        """The operation is done; if the intent stays, the next command finds nothing to do."""
        try:
            self.store.clear_intent(sync=False)
        except StoreFailed as error:
            log.warning("%s", error)

    def sweep(self) -> None:
        """Remove what nothing names from the store; it does no harm if it stays."""
        try:
            self.store.sweep()
        except StoreFailed as error:
            log.warning("%s", error)

    def withdraw(self, names: Iterable[str], loaded: Loaded) -> None:
        """Take back what was recorded of checkpoints since `loaded`.  Raises StoreFailed."""
        for name in names:
            self.store.remove_checkpoint(name)
        now = self.store.load().record
        if now.current is not None and now.current not in loaded.history.checkpoints:
            self.commit_current(loaded.history, now)

    def commit_current(self, history: History, record: DomainRecord) -> DomainRecord:
        """Record which checkpoint is current, in the store and then in the domain's marker.

        A marker that cannot be set is no reason to fail: the store is the truth.
        """
        generation = record.generation + 1
        record = replace(
            record, name=self.adapter.name, current=history.current, generation=generation
        )
        self.store.save_record(record)
        try:
            self.adapter.set_marker(
                None if history.current is None else Marker(history.current, generation)
            )
        except (OperationFailed, Unsupported) as error:
            log.warning("the marker of domain %s could not be set: %s", self.adapter.name, error)
        return record


def lost_current(loaded: Loaded) -> bool:
    """Whether the record of the current checkpoint is lost, or names one that is."""
    if loaded.history.current is not None or not loaded.history.checkpoints:
        return False
    return not loaded.record.name or loaded.record.current is not None


def with_current(loaded: Loaded, marker: Marker | None, domain: str) -> Loaded:
    """What the store has when its current checkpoint is lost: pure.

    The marker says which is current, and else the newest is.  Bitmaps are not read before they
    were seen to be valid, so that a wrong guess makes no wrong answer.

    domain -- the domain's name
    """
    generation = max(loaded.record.generation, 0 if marker is None else marker.generation)
    if marker is not None and marker.checkpoint in loaded.history.checkpoints:
        current = marker.checkpoint
    else:
        current = loaded.history.newest()
    return replace(
        loaded,
        history=replace(loaded.history, current=current),
        record=DomainRecord(domain, current, generation),
    )
