"""restore --define: a new domain from a restore point, whose history goes on from that point.

Its images, and copies of the files that it is made of, are in one folder.  The order, so that
nothing half made is left, wherever it ends:

1. an intent, in the store of the new domain's UUID, says under which names everything is written
2. it is written and made durable, with the bitmap of the first checkpoint in the images
3. the intent says which files these are; they get their names; libvirt is told of the domain
4. its first checkpoint is recorded, which carries the identity of the point, so that its next
   backup is an increment of that

Ended before libvirt knows the domain, it is taken back: see remnants.py.  Ended after that, the
next command on the domain completes it: its images have recorded since 3 what is written to them.
"""

from __future__ import annotations

import logging
import os
import secrets
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..backup import temporaries
from ..backup.definition import Identity, Image, redefined
from ..backup.placement import Request, place
from ..backup.restoring import Kept, made, settled, view, volumes
from ..backup.staging import Progress, Staged, check, install, staged, uninstall
from ..backup.views import RestoreView
from ..checkpoint import EngineName
from ..config import Settings
from ..domain.adapter import DomainAdapter
from ..domain.connection import Connection
from ..engine.qemu_img import change_bitmap
from ..errors import (
    CkptmgrError,
    InvalidRequest,
    RepositoryDamaged,
    StoreFailed,
    Unsupported,
)
from ..plan.steps import Direct, ImageBitmap, Plan
from ..store import Loaded, Store, files
from ..views import DomainView
from .copies import copied
from .inception import intent_of, settle
from .newcomer import COPIED, Making, Prepared, tpm_state
from .remnants import is_known, require_writable, take_back_interrupted
from .session import Session

log = logging.getLogger("ckptmgr")

_OFFLINE = EngineName.OFFLINE


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
    making = Making(connection, kept, prepared, part, temporaries.new_token(), missing)
    with _recorded(making, settings.lock_timeout):
        with (
            made(request.folder),
            staged(
                kept.lineage,
                kept.manifest,
                prepared.places,
                settings.lock_timeout,
                token=making.token,
                announce=lambda names: part.write_intent(intent_of(making, names)),
                progress=progress,
            ) as work,
            copied(making) as copies,
        ):
            _add_bitmaps(work.disks, kept.manifest.name)
            intent = intent_of(making, (), work.disks, copies)
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
    making: Making, disks: Sequence[Staged], copies: Sequence[tuple[Path, Path]]
) -> DomainAdapter:
    """Give the files their names and define the domain, or neither."""
    try:
        install(disks, copies)
        return DomainAdapter.define(making.connection, making.prepared.redefinition.text)
    except BaseException:
        # Where libvirt went away or we are to stop, it may have been done all the same.
        making.unsure = is_known(making.connection, making.prepared.identity.uuid) is not False
        if not making.unsure:
            uninstall(disks, copies)
        raise


@contextmanager
def _recorded(making: Making, lock_timeout: float) -> Iterator[None]:
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
    if "tpm" in copies and (state := tpm_state(connection, prepared)) is not None:
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


def _prepared(connection: Connection, kept: Kept, request: Request, name: str) -> Prepared:
    require_writable(connection)
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
    files = {each.role: folder / each.file for each in kept.manifest.files if each.role in COPIED}
    if kept.manifest.file("tpm") is not None:
        files["tpm"] = folder / "tpm"
    for path in files.values():
        if os.path.lexists(path):
            raise InvalidRequest(f"{path} is there already", hint="name another folder")
    images = {each.disk: Image(each.path, each.format, each.block) for each in places}
    text = _definition(kept)
    return Prepared(places, identity, redefined(text, identity, images, files), files)


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


# --- what it is made of ------------------------------------------------------------------------


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
