"""restore --define: a new domain from a restore point, whose history goes on from that point.

Its images, and copies of the files that it is made of, are in one folder.  libvirt is told of it
when they are durable; then its first checkpoint is made, which carries the identity of the point,
so that its next backup is an increment of that.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..align import untrackable
from ..backup.definition import Identity, Image, Redefinition, redefined
from ..backup.manifest import Manifest
from ..backup.placement import Place, Request, place
from ..backup.restoring import Kept, made, settled, view, volumes
from ..backup.staging import Progress, check, install, staged
from ..backup.views import RestoreView
from ..checkpoint import Checkpoint, EngineName
from ..config import Settings
from ..domain.adapter import DomainAdapter
from ..domain.attachments import attachments
from ..domain.connection import Connection
from ..errors import (
    CkptmgrError,
    InvalidRequest,
    ReadOnlyConnection,
    RepositoryDamaged,
    RestoreFailed,
    Unsupported,
)
from ..history import History
from ..plan.steps import Direct, Plan
from ..store import Store
from ..views import DomainView
from . import creation, recovery
from .session import Session

log = logging.getLogger("ckptmgr")

_COPIED = ("nvram", "varstore", "kernel", "initrd", "dtb")
"""Roles of files that go into the folder."""


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is touched."""

    places: tuple[Place, ...]
    identity: Identity
    redefinition: Redefinition
    files: Mapping[str, Path]


def define(
    connection: Connection,
    store: Store,
    settings: Settings,
    kept: Kept,
    request: Request,
    name: str,
    progress: Progress,
) -> RestoreView:
    """Define a domain from a point.  See Host.restore."""
    request = settled(request)
    prepared = _prepared(connection, kept, request, name)
    for note in prepared.redefinition.notes:
        log.warning("%s", note)
    with (
        made(request.folder),
        staged(kept.lineage, kept.manifest, prepared.places, progress=progress) as work,
        _copies(connection, kept, prepared),
    ):
        try:
            install(work.disks)
            adapter = DomainAdapter.define(connection, prepared.redefinition.text)
        except BaseException:
            for each in work.disks:
                if each.temporary is not None and not each.temporary.exists():
                    with suppress(OSError):
                        each.place.path.unlink(missing_ok=True)
            raise
        done = view(kept.manifest, work.disks, DomainView(adapter.name, adapter.uuid))
    try:
        _begin_history(adapter, store, settings, kept.manifest)
    except CkptmgrError as error:
        log.warning(
            "domain %s is defined, but its history does not go on from the point, so its next "
            "backup is a full one: %s",
            name,
            error,
        )
    return done


def plan_define(connection: Connection, kept: Kept, request: Request, name: str) -> Plan:
    """What define() would do; nothing is touched."""
    prepared = _prepared(connection, kept, settled(request), name)
    check(kept.lineage, kept.points, kept.manifest, prepared.places)
    copies = dict(prepared.files)
    if "tpm" in copies and (state := _tpm(connection, prepared)) is not None:
        copies["tpm"] = state
    return Plan(
        EngineName.OFFLINE,
        (
            *(Direct(str(each)) for each in prepared.places),
            *(Direct(f"copy {role} to {path}") for role, path in copies.items()),
            Direct(f"libvirt: define domain {name}"),
            Direct(f"make checkpoint {kept.manifest.name}, from which its history goes on"),
        ),
        notes=prepared.redefinition.notes,
    )


# --- what is refused ---------------------------------------------------------------------------


def _prepared(connection: Connection, kept: Kept, request: Request, name: str) -> _Prepared:
    if connection.read_only:
        raise ReadOnlyConnection(
            f"the connection to {connection.uri} only allows reading",
            hint="open it for writing, which is without --readonly",
        )
    if not connection.local:
        raise Unsupported(
            f"{connection.uri} is on another machine, which would not find the images",
            hint="run ckptmgr on the hypervisor",
        )
    if request.folder is None:
        raise InvalidRequest("a new domain needs a folder for its files", hint="name one")
    _check_name(connection, name)
    folder = request.folder
    places = place(kept.manifest, request, volumes(request.onto))
    identity = Identity(name, str(uuid.uuid4()), str(uuid.uuid4()), _mac)
    files = {each.role: folder / each.file for each in kept.manifest.files if each.role in _COPIED}
    if kept.manifest.file("tpm") is not None:
        files["tpm"] = folder / "tpm"
    for path in files.values():
        if os.path.lexists(path):
            raise InvalidRequest(f"{path} is there already", hint="name another folder")
    images = {each.disk: Image(each.path, each.format, each.block) for each in places}
    text = _definition(kept)
    return _Prepared(places, identity, redefined(text, identity, images, files), files)


def _check_name(connection: Connection, name: str) -> None:
    if not name.strip() or not name.isprintable() or "/" in name:
        raise InvalidRequest(f"{name!r} cannot be the name of a domain")
    if name in connection.domains():
        raise InvalidRequest(
            f"there is a domain {name!r} on {connection.uri} already", hint="choose another name"
        )


def _definition(kept: Kept) -> str:
    file = kept.manifest.file("domain")
    if file is None:
        raise RepositoryDamaged(
            f"restore point {kept.manifest.name} does not have the definition of its domain"
        )
    return kept.lineage.read(kept.manifest, file).decode(errors="replace")


def _mac() -> str:
    """A MAC address of QEMU's, as libvirt makes them."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


# --- files beside the disks --------------------------------------------------------------------


@contextmanager
def _copies(connection: Connection, kept: Kept, prepared: _Prepared) -> Iterator[None]:
    """The copies of the files that the domain is made of; gone again if the block fails."""
    written: list[Path] = []
    try:
        for file in kept.manifest.files:
            if file.role in _COPIED:
                path = prepared.files[file.role]
                _write(path, kept.lineage.read(kept.manifest, file), written)
            elif file.role == "tpm":
                _unpack(
                    kept.lineage.read(kept.manifest, file),
                    _tpm(connection, prepared),
                    written,
                )
        yield
    except BaseException:
        for path in reversed(written):
            with suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
        raise


def _tpm(connection: Connection, prepared: _Prepared) -> Path | None:
    """Where the new domain's TPM has its state."""
    found = attachments(
        prepared.redefinition.text,
        prepared.identity.uuid,
        connection.driver,
        connection.embedded_root,
    )
    return next((each.path for each in found if each.role == "tpm"), None)


def _write(path: Path, data: bytes, written: list[Path], mode: int = 0o600) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        written.append(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise RestoreFailed(f"{path} cannot be written: {error.strerror}") from error


def _unpack(data: bytes, folder: Path | None, written: list[Path]) -> None:
    """The files of a TPM's state, with the owner that they had: swtpm runs as a user of its own."""
    if folder is None:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isreg() else None
                if source is None:
                    continue
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise RestoreFailed(f"the state of the TPM has a file {member.name!r}")
                path = folder / member.name
                _make_folders(path.parent, written)
                _write(path, source.read(), written)
                _give(member, folder, path, written)
    except (tarfile.TarError, OSError) as error:
        raise RestoreFailed(
            f"the state of the TPM cannot be written to {folder}: {error}"
        ) from error


def _give(member: tarfile.TarInfo, folder: Path, path: Path, written: Sequence[Path]) -> None:
    if os.geteuid() != 0:
        return
    for each in (path, *path.parents):
        if each in written and each.is_relative_to(folder):
            os.chown(each, member.uid, member.gid)


def _make_folders(folder: Path, written: list[Path]) -> None:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o711)
        written.append(each)


# --- history -----------------------------------------------------------------------------------


@dataclass
class _Restored:
    """A `Copying` that copies nothing: the data is that of a point already."""

    point: str
    targets: tuple[str, ...] = ()
    pause: bool = False

    def copy(self, history: History, checkpoint: Checkpoint, served: creation.Served) -> None:
        """There is nothing to copy."""

    def commit(self) -> None:
        """The point is there."""

    def withdraw(self) -> None:
        """And it stays."""


def _begin_history(
    adapter: DomainAdapter, store: Store, settings: Settings, manifest: Manifest
) -> None:
    """Make the new domain's first checkpoint, called as the point."""
    session = Session(
        adapter, store.domain(adapter.uuid), settings, EngineName.OFFLINE, recovery.settled
    )
    if all(untrackable(disk, EngineName.OFFLINE) is not None for disk in session.disks):
        log.warning("no disk of domain %s can keep a bitmap: its history is empty", adapter.name)
        return
    request = creation.Request(manifest.name, None, (), quiesce=False)
    with session.locked() as loaded:
        creation.create_under_lock(session, loaded, request, _Restored(manifest.id))
