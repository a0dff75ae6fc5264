"""Observing everything that check compares; nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import EngineName, State, shown_disks
from ..consistency import Known, Observation
from ..document import bitmap_sizes, parse_libvirt
from ..domain.disk import DiskLayers
from ..domain.job import backup_job
from ..domain.known import known_document, known_names
from ..domain.locks import is_being_written
from ..errors import (
    BitmapBroken,
    InvalidDocument,
    NoCheckpoint,
    OperationFailed,
    ReadOnlyConnection,
    StoreDamaged,
)
from ..history import History
from ..marker import Marker
from ..plan.libvirt import serves
from ..store import INTENT, Damage, DomainStore, Intent, Loaded
from . import adoption
from .session import Session
from .workspace import Workspace

Layers = Mapping[str, DiskLayers]


def observe_all(session: Session) -> Observation:
    """Look at the store, libvirt's list, the images, QEMU and the marker.

    Bitmaps of a running domain are asked for through the monitor, which taints it, unless the
    engine asked for is libvirt's or the connection only allows reading: then only those of known
    checkpoints can be judged.
    """
    stored = session.store.load(afresh=True)
    loaded = session.loaded()
    known = _known(session, loaded)
    asked_of_libvirt = session.active and (
        session.asked is EngineName.LIBVIRT or session.adapter.connection.read_only
    )
    layers, blind = (None, {}) if asked_of_libvirt else _layers(session)
    held = _held(session)
    if layers is not None:
        # While an image is open for writing, all its bitmaps are marked as those of a crash.
        layers = {target: found for target, found in layers.items() if target not in held}
    intent, damaged = read_intent(session.store, stored.damaged)
    marker, no_marker = _marker(session)
    place = session.place()
    return Observation(
        domain=session.adapter.name,
        active=session.active,
        disks=session.disks,
        history=loaded.history,
        record=stored.record,
        damaged=damaged,
        aside=session.store.aside(),
        maps=damaged_maps(session.store, loaded.history),
        intent=intent,
        layers=layers,
        blind=blind,
        held=held,
        sized=_sized(session, loaded.history, known) if asked_of_libvirt else {},
        known=known,
        told=session.tells_libvirt,
        marker=marker,
        no_marker=no_marker,
        job=session.active and _working(session, place),
        leftovers=tuple(str(path) for path in place.files()),
    )


def _layers(session: Session) -> tuple[Layers | None, dict[str, str]]:
    """The bitmaps on the disks' layers; and of the disks whose images cannot be read, why."""
    if session.active:
        return session.layers(EngineName.MONITOR), {}
    if not session.adapter.connection.local:
        return None, {}
    try:
        return session.layers(EngineName.OFFLINE), {}
    except OperationFailed:
        found: dict[str, DiskLayers] = {}
        blind = {}
        for disk in session.disks:
            try:
                layers = session.adapter.layers((disk.target,))
            except OperationFailed as error:
                blind[disk.target] = error.message
            else:
                found.update((each.target, each) for each in layers)
        return found, blind


def _held(session: Session) -> dict[str, str]:
    """The disks of a stopped domain with an image that another program is writing, and that."""
    if session.active or not session.adapter.connection.local:
        return {}
    return {
        disk.target: image.path
        for disk in session.disks
        for image in reversed(disk.chain)
        if image.path is not None and is_being_written(image.path)
    }


def _sized(
    session: Session, history: History, known: tuple[Known, ...]
) -> dict[str, frozenset[str]]:
    names = [
        each.name
        for each in known
        if each.name in history.checkpoints and shown_disks(history.get(each.name))
    ]
    found = {}
    for name in names:
        try:
            sizes = bitmap_sizes(known_document(session.adapter, name, size=True))
        except (BitmapBroken, ReadOnlyConnection):
            continue  # libvirt stops at the first that cannot be merged, and tells of none
        found[name] = frozenset(sizes)
    return found


def read_intent(
    store: DomainStore, damaged: tuple[Damage, ...]
) -> tuple[Intent | None, tuple[Damage, ...]]:
    """The intent; or if it cannot be read, that with the other damage."""
    try:
        return store.read_intent(), damaged
    except StoreDamaged as error:
        return None, (*damaged, Damage(store.path / INTENT, error.message))


def _marker(session: Session) -> tuple[Marker | None, str | None]:
    try:
        return session.adapter.marker(), None
    except InvalidDocument as error:
        return None, error.message


def damaged_maps(store: DomainStore, history: History) -> dict[str, str]:
    """The maps that are named and cannot be read, and why."""
    digests = dict.fromkeys(
        disk.interval.map
        for checkpoint in history.checkpoints.values()
        for disk in checkpoint.disks
        if disk.interval is not None and disk.interval.map is not None
    )
    damaged = {}
    for digest in digests:
        try:
            store.read_map(digest)
        except StoreDamaged as error:
            damaged[digest] = error.message
    return damaged


def _working(session: Session, place: Workspace) -> bool:
    """Whether a job or an NBD server of ours is running."""
    address = place.address
    if address is None:
        return False
    job = backup_job(session.adapter)
    if job is not None and serves(job, address):
        return True
    if place.socket is None or not Path(place.socket).exists():
        return False
    from ..engine.monitor import listening

    return listening(place.socket)


def _known(session: Session, loaded: Loaded) -> tuple[Known, ...]:
    names = known_names(session.adapter)
    refused: Mapping[str, str] = {}
    if any(name not in loaded.history.checkpoints for name in names):
        refused = adoption.prepare(session, loaded).refused
    found = []
    for name in names:
        try:
            given = parse_libvirt(known_document(session.adapter, name), what=f"checkpoint {name}")
        except NoCheckpoint:
            continue  # deleted just now
        except InvalidDocument as error:
            found.append(Known(name, None, frozenset(), refused.get(name, error.message)))
            continue
        tracked = frozenset(disk.name for disk in given.disks if disk.state is State.RECORDING)
        found.append(Known(name, given.parent, tracked, refused.get(name)))
    return tuple(found)
