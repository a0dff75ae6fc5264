"""restore --define: a new domain from a restore point, whose history goes on from that point.

Its images, and copies of the files that it is made of, are in one folder.  The order, so that
nothing half made is left, wherever it ends:

1. an intent, in the store of the new domain's UUID, says under which names everything is written
2. it is written and made durable, with the bitmap of the first checkpoint in the images
3. the intent says which files these are; they get their names; libvirt is told of the domain
4. its first checkpoint is recorded, which carries the identity of the point, so that its next
   backup is an increment of that

Ended before libvirt knows the domain, the next restore of a domain takes it back.  Ended after
that, the next command on the domain completes it: its images have recorded since 3 what is written
to them.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import tarfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..align import untrackable
from ..backup import temporaries
from ..backup.definition import Identity, Image, Redefinition, redefined
from ..backup.placement import Kind, Place, Request, place
from ..backup.restoring import Kept, made, settled, view, volumes
from ..backup.staging import Progress, Staged, check, install, staged, uninstall
from ..backup.views import RestoreView
from ..checkpoint import Checkpoint, EngineName
from ..config import Settings
from ..document import format_libvirt
from ..domain.adapter import DomainAdapter
from ..domain.attachments import attachments
from ..domain.connection import Connection
from ..domain.disk import Disk
from ..engine.qemu_img import change_bitmap
from ..errors import (
    Busy,
    CkptmgrError,
    InvalidRequest,
    NoDomain,
    ReadOnlyConnection,
    RepositoryDamaged,
    RestoreFailed,
    StoreDamaged,
    StoreFailed,
    Unsupported,
)
from ..plan.steps import CheckpointRedefine, Direct, ImageBitmap, Plan
from ..store import DomainStore, Intent, Loaded, Store, files
from ..views import DomainView
from . import projection
from .session import Session
from .tracking import restored_disk, untracked_disk

log = logging.getLogger("ckptmgr")

_COPIED = ("nvram", "varstore", "kernel", "initrd", "dtb")
"""Roles of files that go into the folder."""


OPERATION = "define"
"""Of the intent."""

_OFFLINE = EngineName.OFFLINE

NOT_OURS = "its image is not the one that was restored"


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is touched."""

    places: tuple[Place, ...]
    identity: Identity
    redefinition: Redefinition
    files: Mapping[str, Path]


@dataclass
class _Making:
    """A domain that is being made.

    token -- of the temporary names
    unsure -- libvirt may know the domain, so all has to stay as it is
    """

    connection: Connection
    kept: Kept
    prepared: _Prepared
    part: DomainStore
    token: str
    missing: tuple[Path, ...]
    unsure: bool = False


def define(
    connection: Connection,
    store: Store,
    settings: Settings,
    kept: Kept,
    request: Request,
    name: str,
    progress: Progress,
    recover: Callable[[Session], Loaded],
) -> RestoreView:
    """Define a domain from a point.  See Host.restore.

    recover -- as `Session` takes it
    """
    request = settled(request)
    take_back_interrupted(connection, store)
    prepared = _prepared(connection, kept, request, name)
    for note in prepared.redefinition.notes:
        log.warning("%s", note)
    part = store.domain(prepared.identity.uuid)
    missing = tuple(_missing(request.folder))
    making = _Making(connection, kept, prepared, part, temporaries.new_token(), missing)
    with _recorded(making, settings.lock_timeout):
        with (
            made(request.folder),
            staged(
                kept.lineage,
                kept.manifest,
                prepared.places,
                settings.lock_timeout,
                token=making.token,
                announce=lambda names: part.write_intent(_intent(making, names)),
                progress=progress,
            ) as work,
            _copies(making) as copies,
        ):
            _add_bitmaps(work.disks, kept.manifest.name)
            intent = _intent(making, (), work.disks, copies)
            part.write_intent(intent)
            adapter = _define(making, work.disks, copies)
            done = view(kept.manifest, work.disks, DomainView(adapter.name, adapter.uuid))
        session = Session(adapter, part, settings, _OFFLINE, recover)
        try:
            settle(session, intent)
        except CkptmgrError as error:
            log.warning(
                "domain %s is defined; the next command begins its history: %s", name, error
            )
    return done


def _define(
    making: _Making, disks: Sequence[Staged], copies: Sequence[tuple[Path, Path]]
) -> DomainAdapter:
    """Give the files their names and define the domain, or neither."""
    try:
        install(disks, copies)
        return DomainAdapter.define(making.connection, making.prepared.redefinition.text)
    except BaseException:
        # Where libvirt went away or we are to stop, it may have been done all the same.
        making.unsure = _is_known(making.connection, making.prepared.identity.uuid) is not False
        if not making.unsure:
            uninstall(disks, copies)
        raise


@contextmanager
def _recorded(making: _Making, lock_timeout: float) -> Iterator[None]:
    """Hold the lock of the new domain; if it does not come to be, nothing of it stays recorded."""
    with making.part.lock(lock_timeout):
        try:
            yield
        except BaseException:
            if not making.unsure:
                with suppress(StoreFailed):
                    making.part.clear_intent()
                making.part.remove_unused()
            raise


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
def _copies(making: _Making) -> Iterator[list[tuple[Path, Path]]]:
    """The copies of the files that the domain is made of: their temporary and final names.

    What has no other name is gone at the end; the TPM's state, where the domain is not made.
    """
    kept, prepared = making.kept, making.prepared
    pairs: list[tuple[Path, Path]] = []
    written: list[Path] = []
    state: list[Path] = []
    try:
        for file in kept.manifest.files:
            if file.role in _COPIED:
                path = prepared.files[file.role]
                name = temporaries.temporary(path, making.token)
                _write(name, kept.lineage.read(kept.manifest, file), written)
                pairs.append((name, path))
            elif file.role == "tpm":
                data = kept.lineage.read(kept.manifest, file)
                _unpack(data, _tpm(making.connection, prepared), state)
        yield pairs
    except BaseException:
        if not making.unsure:
            _remove(reversed(state))
        raise
    finally:
        _remove(written)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


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


# --- what is recorded of it --------------------------------------------------------------------


def _intent(
    making: _Making,
    names: Sequence[Path],
    disks: Sequence[Staged] = (),
    copies: Sequence[tuple[Path, Path]] = (),
) -> Intent:
    """What it takes to take it back or to complete it.

    names -- the temporary ones of the disks
    disks, copies -- once they are written
    """
    prepared, manifest = making.prepared, making.kept.manifest
    others = [path for role, path in prepared.files.items() if role in _COPIED]
    names = [*names, *(temporaries.temporary(path, making.token) for path in others)]
    names += [each.temporary for each in disks if each.temporary is not None]
    pairs = [(each.temporary, each.place.path) for each in disks if each.temporary is not None]
    state = _tpm(making.connection, prepared)
    return Intent(
        OPERATION,
        (manifest.name,),
        _OFFLINE.value,
        {
            "uri": making.connection.uri,
            "domain": prepared.identity.name,
            "id": manifest.id,
            "temporaries": [str(name) for name in names],
            "files": {str(path): _identity(name) for name, path in (*pairs, *copies)},
            "replaced": [
                str(each.path) for each in prepared.places if each.kind is Kind.REPLACEMENT
            ],
            "volumes": [str(each.path) for each in prepared.places if each.kind is Kind.VOLUME],
            "folders": [str(folder) for folder in making.missing],
            "tpm": str(state) if _is_new(making, state) else None,
        },
    )


def _is_new(making: _Making, state: Path | None) -> bool:
    """Whether the folder of the TPM's state is there for this domain alone."""
    if state is None:
        return False
    return state.name == making.part.uuid or state == making.prepared.files.get("tpm")


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size]


def _add_bitmaps(disks: Sequence[Staged], name: str) -> None:
    """Have the first checkpoint record in the images from their first instant on."""
    for each in disks:
        if each.temporary is not None and each.place.format == "qcow2":
            change_bitmap(ImageBitmap(each.place.disk, str(each.temporary), "add", name, None))
            files.sync_file(each.temporary)


def _missing(folder: Path | None) -> Iterator[Path]:
    """The folders that are made, the innermost first."""
    for each in () if folder is None else (folder, *folder.parents):
        if not os.path.lexists(each):
            yield each


# --- interrupted -------------------------------------------------------------------------------


def take_back_interrupted(connection: Connection, store: Store) -> None:
    """Take back what was being restored to a domain that never came to be."""
    for key in store.domains():
        part = store.domain(key)
        with suppress(Busy, StoreDamaged, StoreFailed):
            intent = part.read_intent()
            if intent is None or intent.operation != OPERATION:
                continue
            with part.lock(0):
                intent = part.read_intent()
                if intent is None or intent.data["uri"] != connection.uri:
                    continue
                if _is_known(connection, key) is False:
                    _take_back(part, intent)


def _is_known(connection: Connection, uuid: str) -> bool | None:
    """Whether libvirt knows the domain; None where that cannot be told."""
    try:
        connection.lookup(uuid)
    except NoDomain:
        return False
    except CkptmgrError:
        return None
    return True


def _take_back(part: DomainStore, intent: Intent) -> None:
    data = intent.data
    log.warning(
        "taking back an interrupted restore of point %s: domain %s was not defined",
        intent.names[0],
        data["domain"],
    )
    paths = [path for path in map(Path, data["temporaries"]) if temporaries.NAME.match(path.name)]
    for name, identity in data["files"].items():
        with suppress(OSError):
            if _identity(Path(name)) != identity:
                log.warning("%s stays: it is not what was written", name)
            elif name in data["replaced"]:
                log.warning("%s is replaced: what it held is gone", name)
            else:
                paths.append(Path(name))
    for path in paths:
        files.remove(path, sync=False)
    for name in data["volumes"]:
        log.warning("%s may be half written: what it held is gone", name)
    if data["tpm"] is not None and Path(data["tpm"]).is_dir():
        files.remove_tree(Path(data["tpm"]))
    for folder in data["folders"]:
        with suppress(OSError):
            Path(folder).rmdir()
    part.clear_intent()
    part.remove_unused()


def settle(session: Session, intent: Intent) -> None:
    """Begin the history of a domain that is defined; can be stopped at any point and called again.

    To be called under its lock.
    """
    name = intent.names[0]
    for path in map(Path, intent.data["temporaries"]):
        files.remove(path, sync=False)
    session = session.with_any_engine()
    loaded = session.loaded()
    if name not in loaded.history.checkpoints:
        checkpoint = _checkpoint(session, loaded, intent)
        for disk in checkpoint.disks:
            if disk.bitmap is None:
                log.warning("disk %s is not tracked: %s", disk.name, disk.reason)
        if all(disk.bitmap is None for disk in checkpoint.disks):
            log.warning("no disk of domain %s keeps a bitmap: no history", session.adapter.name)
            session.store.clear_intent()
            return
        session.store.save_checkpoint(checkpoint)
        loaded = session.loaded()
    history = replace(loaded.history, current=name)
    session.commit_current(history, loaded.record)
    if session.tells_libvirt:
        shown = format_libvirt(projection.shown(session, history, history.get(name)))
        session.engine(session.choice.engine).run((CheckpointRedefine(name, shown),))
    session.store.clear_intent()


def _checkpoint(session: Session, loaded: Loaded, intent: Intent) -> Checkpoint:
    """The first checkpoint: of the images as they were when they got their names."""
    name = intent.names[0]
    disks = [
        untracked_disk(disk, NOT_OURS)
        if untrackable(disk, _OFFLINE) is None and not _is_restored(disk, intent)
        else restored_disk(name, disk)
        for disk in session.disks
    ]
    return Checkpoint(
        name,
        int(time.time()),
        None,
        _OFFLINE,
        tuple(disks),
        domain_xml=session.definition(),
        point=intent.data["id"],
        generation=loaded.record.generation + 1,
    )


def _is_restored(disk: Disk, intent: Intent) -> bool:
    identity = intent.data["files"].get(disk.top.path)
    try:
        return identity is not None and _identity(Path(str(disk.top.path)))[:2] == identity[:2]
    except OSError:
        return False
