"""What must hold for a revert to be safe, seen to before the domain is touched."""

from __future__ import annotations

import logging
from pathlib import Path

from ..branch import resolve, written_since
from ..checkpoint import EngineName
from ..domain.chain import read_chain
from ..domain.disk import DiskLayers
from ..domain.images import internal_snapshots
from ..domain.job import backup_job, block_jobs
from ..domain.known import known_names
from ..domain.snapshots import reverts_external
from ..errors import Busy, InvalidRequest, Unsupported
from ..snapshot import Kind, Snapshot
from ..store import Loaded
from . import returning
from .session import Session

log = logging.getLogger("ckptmgr")


def refuse(session: Session, loaded: Loaded, snapshot: Snapshot) -> None:
    """See that a revert is safe before anything is touched.

    Raises Unsupported, Busy, InvalidRequest, with the reason.
    """
    _stack(session, snapshot)
    _disks(session, snapshot)
    _below(session, loaded, snapshot)
    for image in returning.returning(session, snapshot):
        returning.refuse(session, loaded.history, image)
    if session.active:
        _in_place(session, snapshot)
        _jobs(session)
    ours = frozenset(loaded.history.checkpoints)
    strangers = set(known_names(session.adapter)) - ours if session.tells_libvirt else ()
    for name in sorted(strangers):
        raise _foreign(session, f"libvirt has a checkpoint {name!r}")
    for target, layers in _layers(session).items():
        for bitmap in (bitmap for layer in layers.layers for bitmap in layer.bitmaps):
            if bitmap.busy:
                raise Busy(f"a job in QEMU is using the bitmap {bitmap.name!r} of {target}")
            if bitmap.name not in {*ours, f"ckptmgr-{target}"}:
                raise _foreign(session, f"disk {target} has a bitmap {bitmap.name!r}")


def _foreign(session: Session, what: str) -> Unsupported:
    return Unsupported(
        f"domain {session.adapter.name!r}: {what} that is not ours, and QEMU reverts no image "
        "that has a bitmap",
        hint="`ckptmgr adopt` takes over libvirt's checkpoints; "
        "`ckptmgr repair --foreign` removes bitmaps that belong to nobody",
    )


def _stack(session: Session, snapshot: Snapshot) -> None:
    adapter = session.adapter
    name = adapter.name
    if not adapter.connection.local:
        raise Unsupported(
            f"domain {name!r} runs on another machine: a revert must see its images",
            hint="run ckptmgr on the hypervisor",
        )
    if snapshot.external and not reverts_external(adapter):
        raise Unsupported(
            f"snapshot {snapshot.name!r} of domain {name!r} is an external one, and this libvirt "
            "cannot revert to those (9.9 and later can)"
        )
    if not snapshot.definition:
        raise Unsupported(
            f"snapshot {snapshot.name!r} of domain {name!r} does not say what the domain was "
            "like, so libvirt would revert its disks alone"
        )
    if not session.active and adapter.has_saved_state():
        raise InvalidRequest(
            f"domain {name!r} has a saved state (virsh managedsave), which would not fit its disks "
            "after the revert",
            hint=f"start the domain, or discard the saved state: virsh managedsave-remove {name}",
        )


def _disks(session: Session, snapshot: Snapshot) -> None:
    """The images that the domain had then are there, with the snapshot in them."""
    name = session.adapter.name
    kinds = dict(snapshot.disks)
    if kinds and all(kind is Kind.NO for kind in kinds.values()):
        raise Unsupported(f"snapshot {snapshot.name!r} of domain {name!r} holds no disk")
    for image in snapshot.images:
        target, path = image.target, image.path
        try:
            Path(path).stat()
            held = internal_snapshots(path)
        except OSError as error:
            raise Unsupported(
                f"the image {path}, which disk {target} of domain {name!r} had when snapshot "
                f"{snapshot.name!r} was taken, cannot be read: {error.strerror}",
                hint="put it back, or delete the snapshot",
            ) from error
        if kinds.get(target) is Kind.INTERNAL and snapshot.name not in held:
            raise Unsupported(
                f"the image {path} of disk {target} does not hold snapshot {snapshot.name!r} of "
                f"domain {name!r}: it is another image, or the snapshot was deleted from it"
            )
    then = {image.target for image in snapshot.images}
    for disk in session.disks:
        if not disk.empty and disk.target not in then:
            log.warning(
                "disk %s was not there when snapshot %s was taken: it is taken from the domain",
                disk.target,
                snapshot.name,
            )


def _below(session: Session, loaded: Loaded, snapshot: Snapshot) -> None:
    """What the snapshot stands on has not been written since: the layers below its images, and of
    an external one those images themselves.
    """
    parent, _ = resolve(loaded.history, loaded.record.moved, snapshot.checkpoint)
    tops = [disk.top.source for disk in session.disks if not disk.empty]
    written = written_since(loaded.history, parent, snapshot.created, tops)
    kinds = dict(snapshot.disks)
    for image in snapshot.images:
        if image.format != "qcow2":
            continue
        chain = read_chain(image.path, "qcow2")
        for layer in chain if kinds.get(image.target) is Kind.EXTERNAL else chain[1:]:
            if layer.image in written:
                raise Unsupported(
                    f"the image {layer.image}, which snapshot {snapshot.name!r} of domain "
                    f"{session.adapter.name!r} stands on, has been the disk that is written since: "
                    f"what the snapshot held of {image.target} is not there any more",
                    hint="delete the snapshot",
                )


def _in_place(session: Session, snapshot: Snapshot) -> None:
    """A libvirt that loads snapshots into the QEMU that runs has just the disks of then there."""
    if not session.adapter.reverts_in_place():
        return
    then = {image.target: image.path for image in snapshot.images}
    now = {
        disk.target: disk.top.source for disk in session.disks if not (disk.empty or disk.read_only)
    }
    for target in sorted(now):
        if now[target] != then.get(target):
            raise Unsupported(
                f"disk {target} of domain {session.adapter.name!r} was "
                f"{then.get(target, 'not there')} when snapshot {snapshot.name!r} was taken and is "
                f"{now[target]} now, and this libvirt loads snapshots into the QEMU that runs",
                hint="stop the domain first, and then revert",
            )


def _jobs(session: Session) -> None:
    name = session.adapter.name
    targets = [disk.target for disk in session.disks if not disk.empty]
    busy = block_jobs(session.adapter, targets)
    if busy:
        raise Busy(
            f"a block job works on {', '.join(busy)} of domain {name!r}",
            hint="wait for it, or end it: virsh blockjob",
        )
    if backup_job(session.adapter) is not None:
        raise Busy(f"a backup job of domain {name!r} is running", hint="wait for it")


def _layers(session: Session) -> dict[str, DiskLayers]:
    """The bitmaps as they are now: of a running domain through the monitor, whatever the engine.

    A bitmap that only QEMU knows would cost the domain its life; a taint costs less.
    """
    return session.layers(EngineName.MONITOR if session.active else EngineName.OFFLINE)
