"""Observing everything that check compares; nothing is decided here."""

from __future__ import annotations

from ..checkpoint import EngineName, State
from ..consistency import Known, Observation, shown_disks
from ..document import bitmap_sizes, parse_libvirt
from ..domain.job import backup_socket
from ..domain.known import known_document, known_names
from ..errors import InvalidDocument, StoreDamaged
from ..store import INTENT, Damage, Loaded
from .session import Session


def observe_all(session: Session, loaded: Loaded) -> Observation:
    """Look at the store, libvirt's list, the images, QEMU and the marker.

    Bitmaps of a running domain are asked for through the monitor, which taints it, unless the
    engine asked for is libvirt's: then only those of known checkpoints can be judged.
    """
    layers, sized = None, {}
    known = _known(session)
    by_name = {checkpoint.name for checkpoint in known}
    if session.asked is EngineName.LIBVIRT and session.active:
        recording = [
            name
            for name, checkpoint in loaded.history.checkpoints.items()
            if name in by_name and shown_disks(checkpoint)
        ]
        sized = {
            name: frozenset(bitmap_sizes(known_document(session.adapter, name, size=True)))
            for name in recording
        }
    elif session.active:
        layers = session.layers(EngineName.MONITOR)
    elif session.adapter.connection.local:
        layers = session.layers(EngineName.OFFLINE)
    place = session.place()
    intent, damaged = None, loaded.damaged
    try:
        intent = session.store.read_intent()
    except StoreDamaged as error:
        damaged = (*damaged, Damage(session.store.path / INTENT, error.message))
    return Observation(
        domain=session.adapter.name,
        active=session.active,
        disks=session.disks,
        history=loaded.history,
        record=loaded.record,
        damaged=damaged,
        intent=intent,
        layers=layers,
        sized=sized,
        known=known,
        told=session.tells_libvirt,
        marker=session.adapter.marker(),
        job=place.socket is not None and backup_socket(session.adapter) == place.socket,
        leftovers=tuple(str(path) for path in place.files()),
    )


def _known(session: Session) -> tuple[Known, ...]:
    found = []
    for name in known_names(session.adapter):
        try:
            given = parse_libvirt(known_document(session.adapter, name), what=f"checkpoint {name}")
        except InvalidDocument:
            # Names of another kind than ours: adopt says so.
            found.append(Known(name, None, frozenset()))
            continue
        tracked = frozenset(disk.name for disk in given.disks if disk.state is State.RECORDING)
        found.append(Known(name, given.parent, tracked))
    return tuple(found)
