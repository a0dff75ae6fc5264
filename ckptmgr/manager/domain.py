"""One domain, and what can be done with its checkpoints, snapshots and restore points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, Unpack

from .. import operation
from ..document import format_libvirt, with_sizes
from ..domain.adapter import DomainAdapter
from ..errors import CkptmgrError, NoCheckpoint
from ..operation.listing import recorded_disks, select, view
from ..operation.observation import observe
from ..operation.session import Session
from ..views import CheckpointView, DiffView, DomainView, ListView, SnapshotView
from .options import BackupOptions, backup_request

if TYPE_CHECKING:
    from ..align import DiskRequest
    from ..backup.views import PointView, RestoreView
    from ..consistency import Finding
    from ..plan.steps import Plan

P = ParamSpec("P")
T = TypeVar("T")


def _names_domain(
    method: Callable[Concatenate[Domain, P], T],
) -> Callable[Concatenate[Domain, P], T]:
    """Have errors of `method` say which domain they are about, where they do not yet."""

    @wraps(method)
    def named(domain: Domain, /, *arguments: P.args, **options: P.kwargs) -> T:
        try:
            return method(domain, *arguments, **options)
        except CkptmgrError as error:
            name = repr(domain.view.name)
            if name not in error.message:
                error.message = f"domain {name}: {error.message}"
            raise

    return named


class Domain:
    """One domain's checkpoints.

    Every command that changes something has a twin ``plan_…`` that takes the same arguments,
    touches nothing and returns what would be done.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def _now(self) -> Session:
        """A session that has looked up nothing yet: domains change between two commands."""
        return self._session.renewed()

    @property
    def adapter(self) -> DomainAdapter:
        """The libvirt side of the domain: its disks, nodes, definition, monitor."""
        return self._session.adapter

    @property
    def view(self) -> DomainView:
        """Name and UUID."""
        return self._session.view

    # --- changes -----------------------------------------------------------------------------

    @_names_domain
    def create(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        disks: Sequence[DiskRequest] = (),
        quiesce: bool = False,
    ) -> CheckpointView:
        """Make a checkpoint of all disks at one instant, and keep the map of what changed before.

        name -- default: the creation time in seconds
        disks -- which to track; default: all that can be
        quiesce -- freeze the guest's file systems for that instant, through its agent
        """
        request = operation.preparation.Request(name, description, tuple(disks), quiesce)
        return operation.creation.create(self._now, request)

    @_names_domain
    def plan_create(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        disks: Sequence[DiskRequest] = (),
        quiesce: bool = False,
    ) -> Plan:
        """What create() would do."""
        request = operation.preparation.Request(name, description, tuple(disks), quiesce)
        return operation.creation.plan_create(self._now, request)

    @_names_domain
    def delete(
        self,
        name: str,
        *,
        children: bool = False,
        children_only: bool = False,
        metadata: bool = False,
    ) -> tuple[str, ...]:
        """Delete a checkpoint and its bitmaps; its intervals join its children's.

        children -- with all that come after it; children_only -- those alone
        metadata -- forget it, here and in libvirt, but leave its bitmaps

        Returns the names of what was deleted.
        """
        request = operation.deletion.Request(name, children, children_only, metadata)
        return operation.deletion.delete(self._now, request)

    @_names_domain
    def plan_delete(
        self,
        name: str,
        *,
        children: bool = False,
        children_only: bool = False,
        metadata: bool = False,
    ) -> Plan:
        """What delete() would do."""
        request = operation.deletion.Request(name, children, children_only, metadata)
        return operation.deletion.plan_delete(self._now, request)

    @_names_domain
    def redefine(self, document: str, *, validate: bool = False) -> CheckpointView:
        """Bring a checkpoint back from its XML, or give a known one another description.

        validate -- see first that its bitmaps are there and whole; libvirt does, where it can
        """
        return operation.redefinition.redefine(self._now, document, validate=validate)

    @_names_domain
    def plan_redefine(self, document: str, *, validate: bool = False) -> Plan:
        """What redefine() would do."""
        return operation.redefinition.plan_redefine(self._now, document, validate=validate)

    @_names_domain
    def adopt(self) -> tuple[CheckpointView, ...]:
        """Take over the checkpoints that libvirt has and the store lacks."""
        return operation.adoption.adopt(self._now)

    @_names_domain
    def plan_adopt(self) -> Plan:
        """What adopt() would do."""
        return operation.adoption.plan_adopt(self._now)

    @_names_domain
    def archive(self, keep: int = 1) -> Mapping[str, tuple[str, ...]]:
        """Let bitmaps go from QEMU and the images; what they say is in the store.

        keep -- how many of the newest each disk keeps, at least the one that records now

        A bitmap stays where it alone knows something.  Returns the checkpoints and, of each, the
        disks whose bitmaps went.
        """
        return operation.archive.archive(self._now, keep)

    @_names_domain
    def plan_archive(self, keep: int = 1) -> Plan:
        """What archive() would do."""
        return operation.archive.plan_archive(self._now, keep)

    @_names_domain
    def repair(self, *, foreign: bool = False) -> tuple[Finding, ...]:
        """Cure what check() finds; returns what was cured.

        foreign -- also remove bitmaps of which nothing says that ckptmgr made them
        """
        return operation.repair.repair(self._now, foreign=foreign)

    def plan_repair(self, *, foreign: bool = False) -> Plan:
        """What repair() would do about what check() finds now; cures may bring up more."""
        return operation.repair.plan_repair(self._now, foreign=foreign)

    # --- backup ----------------------------------------------------------------------------

    @_names_domain
    def backup(
        self,
        repository: str | Path,
        name: str | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Unpack[BackupOptions],
    ) -> PointView:
        """Make a restore point of what the domain is at this instant.

        repository -- folder of the repository; it is made if it is not there
        name -- of the point and its checkpoint; default: the time in seconds
        progress -- called with a disk, how many bytes of it are done, and of how many
        options -- see `BackupOptions`
        """
        lineage, made = operation.backup.backup(
            self._now,
            backup_request(repository, name, options),
            progress or (lambda disk, done, total: None),
        )
        from ..backup.views import point_view  # loaded while the disks were made ready

        folder = str(lineage.path / made.name)
        return point_view(lineage.key, folder, made, parent=made.parent, broken=None)

    @_names_domain
    def plan_backup(
        self,
        repository: str | Path,
        name: str | None = None,
        **options: Unpack[BackupOptions],
    ) -> Plan:
        """What backup() would do."""
        asked = backup_request(repository, name, options)
        return operation.backup.plan_backup(self._now, asked)

    @_names_domain
    def restore(
        self,
        repository: str | Path,
        point: str,
        *,
        disks: Sequence[str] = (),
        progress: Callable[[str, int, int], None] | None = None,
    ) -> RestoreView:
        """Restore disks of the domain, which is shut off, in place.

        disks -- targets; default: all of the point
        progress -- called with a disk, how many bytes of it are done, and of how many

        With all of them the domain goes back to the point: its history gets a branch there.  With
        some it goes on from where it is.  Either way what was restored is the current checkpoint.
        """
        from ..operation import restoration  # libnbd, which few commands need

        request = restoration.Request(Path(repository), point, tuple(disks))
        return restoration.restore(self._now, request, progress or (lambda disk, done, total: None))

    @_names_domain
    def plan_restore(
        self, repository: str | Path, point: str, *, disks: Sequence[str] = ()
    ) -> Plan:
        """What restore() would do."""
        from ..operation import restoration

        request = restoration.Request(Path(repository), point, tuple(disks))
        return restoration.plan_restore(self._now, request)

    # --- snapshots ---------------------------------------------------------------------------

    @_names_domain
    def create_snapshot(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        disk_only: bool = False,
        checkpoint: bool = False,
        memory: str | None = None,
    ) -> SnapshotView:
        """Take a libvirt snapshot, which carries the marker of the current checkpoint.

        disk_only -- without the memory of a running domain, in external files
        checkpoint -- with a checkpoint of the same instant: the guest is paused for both
        memory -- file for the memory of an active domain, on the hypervisor; the disks go on in new
            image files
        """
        request = operation.snapshotting.Request(name, description, disk_only, checkpoint, memory)
        return operation.snapshotting.create(self._now, request)

    @_names_domain
    def plan_create_snapshot(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        disk_only: bool = False,
        checkpoint: bool = False,
        memory: str | None = None,
    ) -> Plan:
        """What create_snapshot() would do."""
        request = operation.snapshotting.Request(name, description, disk_only, checkpoint, memory)
        return operation.snapshotting.plan_create(self._now, request)

    @_names_domain
    def revert_snapshot(self, name: str, *, run: bool | None = None) -> CheckpointView:
        """Go back to a snapshot; the history gets a branch there.

        run -- True: let the domain run afterwards, False: leave it paused; default: the state
               that it had

        Returns the checkpoint of the state that came back, the current one from now on.
        """
        session = self._now
        reverted = operation.reversion.revert(session, operation.reversion.Request(name, run))
        return view(session.history(), reverted, session.view)

    @_names_domain
    def plan_revert_snapshot(self, name: str, *, run: bool | None = None) -> Plan:
        """What revert_snapshot() would do."""
        return operation.reversion.plan_revert(self._now, operation.reversion.Request(name, run))

    @_names_domain
    def delete_snapshot(
        self, name: str, *, children: bool = False, metadata: bool = False
    ) -> tuple[str, ...]:
        """Delete a libvirt snapshot; the history of checkpoints stays as it is.

        children -- with those taken after it; metadata -- forget it, but keep what it holds

        Returns the names of what was deleted.
        """
        return operation.snapshotting.delete(self._now, name, children=children, metadata=metadata)

    @_names_domain
    def plan_delete_snapshot(
        self, name: str, *, children: bool = False, metadata: bool = False
    ) -> Plan:
        """What delete_snapshot() would do."""
        return operation.snapshotting.plan_delete(
            self._now, name, children=children, metadata=metadata
        )

    @_names_domain
    def snapshots(self) -> tuple[SnapshotView, ...]:
        """The libvirt snapshots, and of each the checkpoint that was current then."""
        return operation.snapshotting.listing(self._now)

    # --- questions ---------------------------------------------------------------------------

    @_names_domain
    def checkpoints(
        self,
        *,
        roots: bool = False,
        leaves: bool | None = None,
        start: str | None = None,
        descendants: bool = False,
        topological: bool = False,
        snapshots: bool = False,
    ) -> ListView:
        """The checkpoints, chosen and sorted as by ``virsh checkpoint-list``.

        snapshots -- with the domain's snapshots, and where it is now

        Their states are those recorded; checkpoint() looks.
        """
        session = self._now
        history = session.history()
        names = select(
            history,
            roots=roots,
            leaves=leaves,
            start=start,
            descendants=descendants,
            topological=topological,
        )
        found = tuple(view(history, history.get(name), session.view) for name in names)
        listed = ListView(session.view, history.current, found)
        return operation.snapshotting.with_snapshots(session, listed) if snapshots else listed

    @_names_domain
    def checkpoint(self, name: str, *, size: bool = False) -> CheckpointView:
        """One checkpoint, with the state its bitmaps really are in.  Raises NoCheckpoint.

        size -- with the bytes written since, for each disk
        """
        session = self._now
        history = session.history()
        checkpoint = observe(session, history.get(name))
        disks = recorded_disks(checkpoint)
        if size:
            disks = operation.difference.sized(session, name, disks)
        return view(history, checkpoint, session.view, disks)

    @_names_domain
    def document(self, name: str, *, size: bool = False) -> str:
        """The XML of a checkpoint that libvirt would take.  Raises NoCheckpoint.

        size -- with the bytes written since, for each disk
        """
        document = format_libvirt(self._now.history().get(name))
        if not size:
            return document
        disks = self.checkpoint(name, size=True).disks
        return with_sizes(
            document,
            {disk.name: disk.dirty_bytes for disk in disks if disk.dirty_bytes is not None},
        )

    @_names_domain
    def has_current(self) -> bool:
        """Whether there is a current checkpoint."""
        return self._now.history().has_current

    @_names_domain
    def current(self) -> CheckpointView | None:
        """The current checkpoint, the parent of the next one; None if there is none."""
        current = self._now.history().current
        return None if current is None else self.checkpoint(current)

    @_names_domain
    def parent(self, name: str) -> CheckpointView:
        """The parent of a checkpoint.  Raises NoCheckpoint if it is a root."""
        parent = self._now.history().parent(name)
        if parent is None:
            raise NoCheckpoint(f"checkpoint {name} has no parent")
        return self.checkpoint(parent)

    @_names_domain
    def check(self) -> tuple[Finding, ...]:
        """What of the store, libvirt, the images, QEMU and the marker does not fit together.

        Of a running domain it asks the monitor, which taints it, unless the host was connected
        with ``engine="libvirt"``: bitmaps that libvirt does not know are not seen then.
        """
        return operation.repair.check(self._now)

    @_names_domain
    def diff(self, start: str, end: str | None = None) -> DiffView:
        """What changed from one checkpoint to another, or until now, on each disk."""
        return operation.difference.diff(self._now, start, end)
