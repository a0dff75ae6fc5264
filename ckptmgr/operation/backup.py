"""backup: a restore point of what a domain is at one instant, in a repository.

The order, so that nothing is lost wherever it ends:

1. the checkpoint's intent is written; QEMU makes the bitmaps and serves the disks as they are;
2. the maps of the intervals that end, and the copies of the disks, are made durable;
3. what served them is ended; the point comes to be, by the rename of its folder;
4. the checkpoint comes to be.

Ended before 3, the checkpoint is taken back, and the next backup covers both periods.  Between 3
and 4 the point is one that no checkpoint of the history names: it can be restored, and the next
one stands on the point before it.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..align import find_disk, untrackable
from ..backup.base import Base, DiskBase, disk_base, find_base
from ..backup.block import BLOCK, block_count, blocks_of
from ..backup.copying import Rate, Source
from ..backup.digests import Digests
from ..backup.layer import Layer
from ..backup.manifest import (
    FULL,
    INCREMENTAL,
    Manifest,
    PointDisk,
    PointFile,
    check_target,
    new_id,
)
from ..backup.points import Points
from ..backup.repository import Draft, Lineage, Repository
from ..checkpoint import Checkpoint, EngineName, check_name
from ..document import format_libvirt
from ..domain.attachments import attachments, members
from ..domain.disk import Disk
from ..domain.known import known_names
from ..errors import (
    GuestAgentFailed,
    InvalidRequest,
    OperationFailed,
    PointExists,
    RepositoryDamaged,
    RepositoryFailed,
)
from ..history import History
from ..plan import planner
from ..plan.request import CreateRequest
from ..plan.steps import Direct, Plan
from ..store import Loaded
from . import creation, difference
from .creation import Served
from .session import Session

log = logging.getLogger("ckptmgr")

Progress = Callable[[str, int, int], None]
"""Called with a disk, the bytes of it that are done, and how many there are to do."""

CHAIN_MAX = 128
"""Images that one may stand on; libvirt starts no domain with more than 200."""

SCRATCH_RESERVE = 128 << 20
"""Bytes that must stay free where QEMU keeps what the guest overwrites while it is read: without
room there, QEMU would fail the guest's own write."""

_SCRATCH_INTERVAL = 0.5

_FILES = {
    "nvram": "nvram.fd",
    "varstore": "varstore.json",
    "kernel": "kernel",
    "initrd": "initrd",
    "dtb": "dtb",
    "tpm": "tpm.tar",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    name -- of the point and its checkpoint; None: the time in seconds
    full -- stand on no other point
    disks -- targets or paths; none: all that have an image
    quiesce -- freeze the guest's file systems for the instant; None: if its agent is there
    pause -- have the guest stand still for the instant
    limit -- bytes per second; None: no limit
    """

    repository: Path
    name: str | None = None
    full: bool = False
    disks: tuple[str, ...] = ()
    compress: bool = False
    quiesce: bool | None = None
    pause: bool = False
    limit: int | None = None


def backup(session: Session, request: Request, progress: Progress) -> Manifest:
    """Make a restore point.  See Domain.backup."""
    session.require_writable()
    if request.name is not None:
        check_name(request.name)
    targets = _targets(session, request)
    repository = Repository(request.repository)
    repository.make()
    with session.locked() as loaded, _lineage(session, repository, loaded.history) as lineage:
        name = _name(session, loaded, lineage, request.name)
        with _Point.begun(session, lineage, loaded.history, request, targets, name) as point:
            point.progress = progress
            _make(session, loaded, point)
            return point.manifest


def plan_backup(session: Session, request: Request) -> Plan:
    """What backup() would do; nothing is touched, not even a lock."""
    session.require_writable()
    targets = _targets(session, request)
    repository = Repository(request.repository)
    loaded = session.loaded()
    found = {}
    if repository.path.is_dir():
        found = {each.key: each.load().points for each in repository.lineages()}
    base = find_base(loaded.history, session.adapter.uuid, found)
    steps = []
    for target in targets:
        on = None
        if base is not None and not request.full:
            points = found[base.lineage]
            on = disk_base(loaded.history, session.adapter.uuid, points, base, target)
        how = "all of it" if on is None else f"what changed since restore point {on.point}"
        steps.append(Direct(f"repository: copy {how} of {target}"))
    asked = creation.Request(request.name, None, (), quiesce=bool(request.quiesce))
    copying = _Wanted("0" * 32, targets, request.pause)
    if _tracked(session):
        plan = creation.prepare(session, loaded, asked, session.place(), copying=copying).plan
    else:
        plan = _serving(session, targets)
    after = f" after {base.point}" if base is not None else ""
    steps.append(Direct(f"repository: make the restore point{after} in {repository.path}"))
    return replace(plan, steps=(*plan.steps, *steps))


# --- what is asked for -------------------------------------------------------------------------


def _targets(session: Session, request: Request) -> tuple[str, ...]:
    """The disks to copy.  Raises InvalidRequest, Unsupported."""
    disks = session.disks
    if request.disks:
        chosen = [find_disk(disks, name) for name in request.disks]
        for disk in chosen:
            if disk.empty:
                raise InvalidRequest(f"there is no medium in disk {disk.target}")
    else:
        chosen = [disk for disk in disks if _has_data(disk)]
    targets = tuple(dict.fromkeys(check_target(disk.target) for disk in chosen))
    if not targets:
        raise InvalidRequest(f"domain {session.adapter.name!r} has no disk to back up")
    return targets


def _has_data(disk: Disk) -> bool:
    if disk.empty or disk.device not in ("disk", "lun"):
        return False
    why = None
    if disk.transient:
        why = "it is transient: what it holds goes when the domain ends"
    elif disk.top.type == "vhostuser":
        why = "it is a vhost-user device, whose data QEMU does not see"
    if why is not None:
        log.warning("disk %s is not backed up: %s", disk.target, why)
    return why is None


def _tracked(session: Session) -> bool:
    """Whether a checkpoint would track any disk."""
    engine = session.choice.engine
    return any(untrackable(disk, engine) is None for disk in session.disks)


def _name(session: Session, loaded: Loaded, lineage: Lineage, asked: str | None) -> str:
    taken = set(lineage.names())
    if asked is not None:
        if asked in taken:
            raise PointExists(
                f"there is a restore point {asked} of domain {session.adapter.name!r} already",
                hint="choose another name",
            )
        return asked
    taken |= {*loaded.history.checkpoints, *loaded.damaged_names, *loaded.record.moved}
    if session.tells_libvirt:
        taken |= set(known_names(session.adapter))
    now = int(time.time())
    return next(name for name in map(str, range(now, now + len(taken) + 1)) if name not in taken)


@contextmanager
def _lineage(session: Session, repository: Repository, history: History) -> Iterator[Lineage]:
    """The lineage that the next point belongs to, locked and settled."""
    found = {each.key: each.load().points for each in repository.lineages()}
    base = find_base(history, session.adapter.uuid, found)
    lineage = repository.lineage(base.lineage if base is not None else session.adapter.uuid)
    with lineage.lock(session.settings.lock_timeout):
        lineage.settle()
        yield lineage


# --- making it ---------------------------------------------------------------------------------


def _make(session: Session, loaded: Loaded, point: _Point) -> None:
    quiesce = point.request.quiesce
    auto = quiesce is None
    if quiesce is None:
        quiesce = session.active and session.adapter.has_agent()
    if not _tracked(session):
        log.warning(
            "no disk of domain %s can keep a bitmap, so every backup reads all of them",
            session.adapter.name,
        )
        _without_checkpoint(session, point, quiesce=quiesce)
        return
    asked = creation.Request(point.name, None, (), quiesce)
    try:
        creation.create_under_lock(session, loaded, asked, point)
    except GuestAgentFailed as error:
        if not (auto and quiesce):
            raise
        log.warning("the guest's file systems are not frozen for this backup: %s", error)
        creation.create_under_lock(
            session.renewed(), session.loaded(), replace(asked, quiesce=False), point
        )


def _without_checkpoint(session: Session, point: _Point, *, quiesce: bool) -> None:
    with session.workspace():
        plan = _serving(session, point.targets, quiesce=quiesce)
        engine = session.engine(plan.engine)
        try:
            outcome = engine.run(plan.steps)
            point.copy(session.history(), None, outcome.served)
            engine.run(plan.finish)
            point.commit()
        except BaseException:
            engine.run(plan.undo)
            raise


def _serving(session: Session, targets: tuple[str, ...], *, quiesce: bool = False) -> Plan:
    engine = session.choice.engine
    workspace = session.place()
    return planner(engine).create(
        CreateRequest(
            name="",
            document="",
            redefinition="",
            disks=(),
            socket=workspace.address if engine is not EngineName.OFFLINE else None,
            quiesce=session.settings.freeze_timeout if quiesce else None,
            serve=creation.serve_disks(session, targets, workspace),
        )
    )


@dataclass
class _Wanted:
    """A `Copying` that is only planned."""

    point: str
    targets: tuple[str, ...]
    pause: bool

    def copy(self, history: History, checkpoint: Checkpoint, served: Served) -> None:
        raise RuntimeError("this is only planned")

    def commit(self) -> None:
        raise RuntimeError("this is only planned")


class _Point:
    """The point that is being made: a `Copying`.

    manifest -- once the data is copied
    """

    manifest: Manifest

    def __init__(
        self,
        session: Session,
        lineage: Lineage,
        history: History,
        request: Request,
        targets: tuple[str, ...],
        draft: Draft,
    ) -> None:
        self.request = request
        self.targets = targets
        self.pause = request.pause
        self.point = new_id()
        self.name = draft.name
        self.progress: Progress = lambda disk, done, total: None
        self._session = session
        self._lineage = lineage
        self._draft = draft
        self._points: Points = lineage.load().points
        self._rate = Rate(request.limit)
        self._base: Base | None = find_base(
            history, session.adapter.uuid, {lineage.key: self._points}
        )

    @classmethod
    @contextmanager
    def begun(
        cls,
        session: Session,
        lineage: Lineage,
        history: History,
        request: Request,
        targets: tuple[str, ...],
        name: str,
    ) -> Iterator[_Point]:
        """A new point; what there is of it goes if it does not come to be."""
        draft = lineage.draft(name)
        try:
            yield cls(session, lineage, history, request, targets, draft)
        finally:
            draft.abandon()  # nothing, once it is committed

    # --- Copying -----------------------------------------------------------------------------

    def copy(self, history: History, checkpoint: Checkpoint | None, served: Served) -> None:
        """Copy the disks, and what is beside them."""
        # First, since they are small and may change meanwhile.
        files = tuple(self._files(checkpoint))
        disks = tuple(self._copied(history, checkpoint, target, served) for target in self.targets)
        parent = None if self._base is None else self._points.get(self._base.point)
        adapter = self._session.adapter
        self.manifest = Manifest(
            id=self.point,
            name=self.name,
            domain_name=adapter.name,
            domain_uuid=adapter.uuid,
            parent=None if parent is None else parent.name,
            parent_id=None if parent is None else parent.id,
            checkpoint=None if checkpoint is None else checkpoint.name,
            checkpoint_created=None if checkpoint is None else checkpoint.created,
            created=int(time.time()) if checkpoint is None else checkpoint.created,
            disks=disks,
            files=files,
        )

    def commit(self) -> None:
        """Make the point exist."""
        self._draft.commit(self.manifest)

    # --- disks -------------------------------------------------------------------------------

    def _copied(
        self, history: History, checkpoint: Checkpoint | None, target: str, served: Served
    ) -> PointDisk:
        server, export = served[target]
        with ExitStack() as stack:
            source = stack.enter_context(Source(server, export, target))
            below = self._below(history, target, stack)
            runs, reason = self._runs(history, checkpoint, target, below, source.size)
            layer = Layer(
                self._draft.path(f"{target}.qcow2"),
                self._draft.path(f"{target}.digests"),
                -(-source.size // 512) * 512,
                backing=None if below.base is None else f"../{below.base.point}/{below.file}",
                lower=below.layers,
                compress=self.request.compress,
            )
            try:
                source.read(
                    runs, layer, rate=self._rate, progress=self._advance(target, runs, source.size)
                )
                size = layer.close()
            except BaseException:
                layer.abandon()
                raise
        disk = find_disk(self._session.disks, target)
        with Digests(self._draft.path(f"{target}.digests")) as digests:
            sha256 = digests.sha256
        return PointDisk(
            name=target,
            mode=FULL if below.base is None else INCREMENTAL,
            base=None if below.base is None else below.base.point,
            base_id=None if below.base is None else self._points.get(below.base.point).id,
            file=f"{target}.qcow2",
            bytes=size,
            virtual_size=-(-source.size // 512) * 512,
            digests=f"{target}.digests",
            digests_sha256=sha256,
            format=disk.top.format or "raw",
            compression="zstd" if self.request.compress else None,
            reason=reason,
        )

    def _below(self, history: History, target: str, stack: ExitStack) -> _Below:
        """What the image of `target` is to stand on."""
        if self.request.full:
            return _Below(reason="a full backup was asked for")
        if self._base is None:
            return _Below(reason="there is no restore point before it")
        uuid = self._session.adapter.uuid
        base = disk_base(history, uuid, self._points, self._base, target)
        if base is None:
            return _Below(reason="no restore point before it has this disk")
        try:
            chain = self._points.chain(base.point, target)
            if len(chain) >= CHAIN_MAX:
                return _Below(reason=f"{len(chain)} images stand on one another before it")
            return self._opened(base, chain, target, stack)
        except (RepositoryDamaged, RepositoryFailed) as error:
            log.warning("disk %s is backed up in full: %s", target, error)
            return _Below(reason=f"the restore point before it is damaged: {error.message}")

    def _opened(
        self, base: DiskBase, chain: tuple[str, ...], target: str, stack: ExitStack
    ) -> _Below:
        layers = []
        for name in chain:
            manifest = self._points.get(name)
            recorded = self._points.disk(name, target)
            image = self._lineage.image(manifest, target)
            try:
                there = image.stat().st_size
            except OSError as error:
                raise RepositoryDamaged(f"{image} cannot be read: {error.strerror}") from error
            if there != recorded.bytes:
                raise RepositoryDamaged(f"{image} has {there} bytes in place of {recorded.bytes}")
            layer = stack.enter_context(Digests(self._lineage.digests(manifest, target)))
            if layer.sha256 != recorded.digests_sha256:
                raise RepositoryDamaged(f"{layer.path} is not what the manifest of {name} says")
            layers.append(layer)
        recorded = self._points.disk(base.point, target)
        return _Below(base, recorded.file, tuple(layers))

    def _runs(
        self,
        history: History,
        checkpoint: Checkpoint | None,
        target: str,
        below: _Below,
        size: int,
    ) -> tuple[list[tuple[int, int]], str | None]:
        """The blocks to read, and why it is all of them where that is so."""
        whole = [(0, block_count(size))]
        if below.base is None:
            return whole, below.reason
        if checkpoint is None or below.base.checkpoint is None:
            return whole, "compared as a whole: the history does not reach back to that point"
        changed = difference.between(
            self._session, history, target, below.base.checkpoint, checkpoint.name, size
        )
        if not changed.known:
            return whole, f"compared as a whole: {changed.reason}"
        extents = changed.extents()
        then = below.layers[0].size
        if then != size:
            # Also where it became smaller: its last block has another length now.
            last = min(then, size) // BLOCK * BLOCK
            extents = sorted([*extents, (last, max(0, size - last))])
        return list(blocks_of(extents)), None

    def _advance(
        self, target: str, runs: Iterable[tuple[int, int]], size: int
    ) -> Callable[[int], None]:
        total = sum(min(first + count, block_count(size)) - first for first, count in runs)
        total = min(total * BLOCK, size)
        done = 0
        looked = 0.0
        self.progress(target, 0, total)

        def advance(length: int) -> None:
            nonlocal done, looked
            done += length
            self.progress(target, done, total)
            now = time.monotonic()
            if now - looked > _SCRATCH_INTERVAL:
                looked = now
                self._look_at_scratch()

        return advance

    def _look_at_scratch(self) -> None:
        """Raises OperationFailed before QEMU has no room for what the guest overwrites."""
        folder = self._session.place().folder
        if folder is None or self._session.choice.engine is EngineName.OFFLINE:
            return
        try:
            found = os.statvfs(folder)
        except OSError:
            return  # the domain ended; the reading will say so
        if found.f_bavail * found.f_frsize < SCRATCH_RESERVE:
            raise OperationFailed(
                f"{folder}, where QEMU keeps what the guest overwrites while domain "
                f"{self._session.adapter.name!r} is backed up, has less than "
                f"{SCRATCH_RESERVE >> 20} MiB left",
                hint="free some space there, or set socket_directory in ckptmgr.toml",
            )

    # --- what is beside the disks ------------------------------------------------------------

    def _files(self, checkpoint: Checkpoint | None) -> Iterator[PointFile]:
        adapter = self._session.adapter
        definition = checkpoint.domain_xml if checkpoint is not None else None
        definition = definition or self._session.definition()
        yield self._draft.write("domain", "domain.xml", definition.encode())
        if checkpoint is not None:
            text = format_libvirt(checkpoint)
            yield self._draft.write("checkpoint", "checkpoint.xml", text.encode())
        location = adapter.connection
        found = attachments(definition, adapter.uuid, location.driver, location.embedded_root)
        for attachment in found:
            try:
                if not location.local:
                    raise OSError(0, "it is on another machine")
                if attachment.role == "tpm":
                    data = _archive(attachment.path)
                else:
                    data = attachment.path.read_bytes()
            except OSError as error:
                log.warning(
                    "%s (%s) is not in the restore point: %s",
                    attachment.path,
                    attachment.role,
                    error.strerror,
                )
                continue
            yield self._draft.write(
                attachment.role, _FILES[attachment.role], data, str(attachment.path)
            )


@dataclass(frozen=True)
class _Below:
    """What an image is to stand on; base None: nothing, for `reason`."""

    base: DiskBase | None = None
    file: str = ""
    layers: tuple[Digests, ...] = ()
    reason: str | None = None


def _archive(folder: Path) -> bytes:
    """The files of a folder as a tar archive."""
    if not folder.is_dir():
        raise FileNotFoundError(2, "there is no such folder", str(folder))
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in members(folder):
            archive.add(path, arcname=str(path.relative_to(folder)), recursive=False)
    return output.getvalue()
