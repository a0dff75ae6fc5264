"""Plans for the QEMU monitor: bitmaps exactly as libvirt makes them, without its API.

One transaction over all disks adds the new bitmaps and, for each interval that ends, a
temporary disabled bitmap into which the one that is recording is merged from all layers; that
copy is then read over NBD and removed.  (qapi/transaction.json; libvirt's
qemuCheckpointCreate and qemuBackupDiskPrepareOneBitmapsChain do the same.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint import EngineName
from ..domain.disk import DiskLayers, Layer
from ..errors import Busy, NodeUnknown, OperationFailed
from .checks import check_name_free, check_readable, check_socket, finest, top_layer
from .request import CreateRequest, DeleteRequest, ReadRequest, ServeDisk, UndoRequest
from .steps import (
    BitmapRef,
    BitmapsRemove,
    CheckpointDelete,
    CheckpointRedefine,
    DataServed,
    Export,
    NbdExport,
    NbdStart,
    NbdStop,
    NodeExport,
    Plan,
    Quiesced,
    ReadMaps,
    Scratch,
    ScratchAdd,
    ScratchExport,
    ScratchRemove,
    Server,
    Step,
    Transaction,
)

Action = Mapping[str, Any]


def create(request: CreateRequest) -> Plan:
    """Make a checkpoint; read the intervals of the disks that have a `since`; serve the data.

    Data of the instant is served as libvirt does it: a qcow2 file over the disk's own node takes
    what the guest overwrites (blockdev-backup with sync=none, in the same transaction), and is
    exported.
    """
    check_name_free(request)
    copies = [
        _Copy(disk.target, disk.since, disk.layers)
        for disk in request.disks
        if disk.since is not None
    ]
    actions = [
        _add(
            node_of(disk.target, top_layer(disk.target, disk.layers)),
            request.name,
            persistent=disk.persistent,
            disabled=False,
            granularity=disk.granularity,
        )
        for disk in request.disks
    ]
    told: tuple[Step, ...] = ()
    if request.tell_libvirt:
        told = (CheckpointRedefine(request.name, request.redefinition),)
    if request.serve:
        before, at_once, after, finish = _serving(request, copies)
    else:
        before, at_once, after = _reading(request.socket, copies)
        finish = ()
    instant = Transaction((*actions, *at_once))
    undo = undo_create(
        UndoRequest(
            request.name,
            request.redefinition,
            tuple(disk.layers for disk in request.disks if disk.layers is not None),
            request.socket if copies or request.serve else None,
            request.tell_libvirt,
        )
    )
    release = _release(request.socket, copies)
    if request.serve:
        release = (NbdStop(check_socket(request.socket)), ScratchRemove(), *release)
    return Plan(
        EngineName.MONITOR,
        steps=(
            *before,
            instant if request.quiesce is None else Quiesced(instant, request.quiesce),
            *after,
            *told,
        ),
        undo=undo,
        release=release,
        finish=finish,
    )


def undo_create(request: UndoRequest) -> tuple[Step, ...]:
    """Take back a create: stop its server, remove its bitmaps and what was made for reading."""
    steps: list[Step] = []
    if request.told_libvirt:
        steps.append(CheckpointDelete(request.name, metadata_only=True, missing_ok=True))
    if isinstance(request.socket, str):
        steps += [NbdStop(request.socket), ScratchRemove()]
    refs: list[BitmapRef] = []
    for disk in request.disks:
        top = top_layer(disk.target, disk)
        refs += [
            _ref(disk.target, layer, request.name)
            for layer in disk.layers
            if layer is top or layer.bitmap(request.name) is not None
        ]
        # A snapshot may have been taken since: the temporary bitmap stays on the layer below.
        refs += [
            _ref(disk.target, layer, temporary(disk.target))
            for layer in disk.layers
            if layer is top or layer.bitmap(temporary(disk.target)) is not None
        ]
    if refs:
        steps.append(BitmapsRemove(tuple(refs), missing_ok=True))
    return tuple(steps)


def delete(request: DeleteRequest) -> Plan:
    """Remove a checkpoint's bitmaps from every layer, whatever state they are in.

    Raises Busy if a job of QEMU's uses one of them.
    """
    disks = () if request.metadata_only else request.disks
    refs: list[BitmapRef] = []
    for disk in disks:
        for layer in disk.layers.holding(request.name) if disk.layers else ():
            bitmap = layer.bitmap(request.name)
            if bitmap is not None and bitmap.busy:
                raise Busy(
                    f"the bitmap {request.name!r} of disk {disk.target} is in use by a job in QEMU"
                )
            refs.append(_ref(disk.target, layer, request.name))
    steps: list[Step] = [BitmapsRemove(tuple(refs))] if refs else []
    if request.known_to_libvirt:
        steps.append(CheckpointDelete(request.name, metadata_only=True, missing_ok=True))
    return Plan(EngineName.MONITOR, tuple(steps))


def read(request: ReadRequest) -> Plan:
    """Read open intervals, all of one instant."""
    copies = [_Copy(disk.target, disk.since, disk.layers) for disk in request.disks]
    before, at_once, after = _reading(request.socket, copies)
    release = _release(request.socket, copies)
    return Plan(
        EngineName.MONITOR,
        steps=(*before, Transaction(tuple(at_once)), *after),
        undo=release,
        release=release,
    )


def temporary(target: str) -> str:
    """Name of the bitmap that a disk's interval is copied into for reading."""
    return f"ckptmgr-{target}"


def node_of(target: str, layer: Layer) -> str:
    """The block node of a layer.  Raises NodeUnknown, naming disk and image."""
    if layer.node is None:
        raise NodeUnknown(f"the block node of {layer.image}, of disk {target}, is not known")
    return layer.node


class _Copy:
    """The interval of one disk, to be copied at the instant and read afterwards."""

    def __init__(self, target: str, since: str, layers: DiskLayers | None) -> None:
        top = top_layer(target, layers)
        assert layers is not None  # noqa: S101 -- top_layer() saw to it
        holding = check_readable(target, since, layers)
        self.target = target
        self.since = since
        self.node = node_of(target, top)
        self.sources = tuple(node_of(target, layer) for layer in holding)
        self.granularity = finest(since, holding)
        self.copy = _ref(target, top, temporary(target))
        self.stale = top.bitmap(temporary(target)) is not None

    @property
    def export(self) -> Export:
        return Export(self.target, self.target, temporary(self.target), self.granularity)

    def actions(self) -> tuple[Action, ...]:
        name = temporary(self.target)
        return (
            _add(self.node, name, persistent=False, disabled=True, granularity=self.granularity),
            {
                "type": "block-dirty-bitmap-merge",
                "data": {
                    "node": self.node,
                    "target": name,
                    "bitmaps": [{"node": node, "name": self.since} for node in self.sources],
                },
            },
        )


def _reading(
    socket: Server | None, copies: list[_Copy]
) -> tuple[tuple[Step, ...], list[Action], tuple[Step, ...]]:
    """What reading `copies` adds before the transaction, to it, and after it.

    The server is started first: that is what another job or server of QEMU's would refuse.
    """
    if not copies:
        return (), [], ()
    path = check_socket(socket)
    before: tuple[Step, ...] = (NbdStart(path),)
    stale = tuple(copy.copy for copy in copies if copy.stale)
    if stale:  # a read that was killed
        before = (NbdStop(path), BitmapsRemove(stale, missing_ok=True), *before)
    exports = tuple(NodeExport(copy.export, copy.node) for copy in copies)
    after: tuple[Step, ...] = (
        NbdExport(exports),
        ReadMaps(path, tuple(item.export for item in exports)),
        NbdStop(path),
        BitmapsRemove(tuple(copy.copy for copy in copies)),
    )
    return before, [action for copy in copies for action in copy.actions()], after


def _serving(
    request: CreateRequest, copies: list[_Copy]
) -> tuple[tuple[Step, ...], list[Action], tuple[Step, ...], tuple[Step, ...]]:
    """As `_reading`, with the data of disks; fourth, what is done when that was read."""
    path = check_socket(request.socket)
    scratches = tuple(_scratch(disk) for disk in request.serve)
    before: list[Step] = []
    stale = tuple(copy.copy for copy in copies if copy.stale)
    if stale:  # a read that was killed
        before += [NbdStop(path), BitmapsRemove(stale, missing_ok=True)]
    before += [NbdStart(path), ScratchAdd(scratches)]
    actions = [action for copy in copies for action in copy.actions()]
    actions += [
        {
            "type": "blockdev-backup",
            "data": {
                "job-id": scratch.name,
                "device": scratch.node,
                "target": scratch.name,
                "sync": "none",
            },
        }
        for scratch in scratches
    ]
    after: list[Step] = [ScratchExport(scratches)]
    if copies:
        exports = tuple(NodeExport(copy.export, copy.node) for copy in copies)
        after += [NbdExport(exports), ReadMaps(path, tuple(item.export for item in exports))]
    after.append(DataServed(path, tuple((each.disk, each.name) for each in scratches)))
    finish: list[Step] = [NbdStop(path), ScratchRemove()]
    if copies:
        finish.append(BitmapsRemove(tuple(copy.copy for copy in copies)))
    return tuple(before), actions, tuple(after), tuple(finish)


def scratch_name(target: str) -> str:
    """Name of the node over a disk's own, of its export and of the job that fills it."""
    return f"ckptmgr-scratch-{target}"  # QEMU's limit for node names is 31 characters


def _scratch(disk: ServeDisk) -> Scratch:
    if disk.scratch is None:
        raise OperationFailed(f"there is no place for a scratch file of disk {disk.target}")
    node = node_of(disk.target, top_layer(disk.target, disk.layers))
    return Scratch(disk.target, node, disk.scratch, scratch_name(disk.target))


def _release(socket: Server | None, copies: list[_Copy]) -> tuple[Step, ...]:
    if not copies or not isinstance(socket, str):
        return ()
    return (
        NbdStop(socket),
        BitmapsRemove(tuple(copy.copy for copy in copies), missing_ok=True),
    )


def _ref(target: str, layer: Layer, name: str) -> BitmapRef:
    return BitmapRef(
        node_of(target, layer), name, disk=target, image=layer.image, read_only=layer.read_only
    )


def _add(
    node: str, name: str, *, persistent: bool, disabled: bool, granularity: int | None
) -> Action:
    data: dict[str, Any] = {
        "node": node,
        "name": name,
        "persistent": persistent,
        "disabled": disabled,
    }
    if granularity is not None:
        data["granularity"] = granularity
    return {"type": "block-dirty-bitmap-add", "data": data}
