"""Plans for domains that do not run: qemu-img and qemu-nbd on their local images.

The new bitmap is added before the old one is read.  Should anything write in between (a domain
that is started and ended there and then), both have it: an interval may say too much, never too
little.
"""

from __future__ import annotations

from ..checkpoint import EngineName
from ..domain.disk import DiskLayers, Layer
from ..errors import InvalidRequest, Unsupported
from .checks import check_name_free, check_readable, top_layer
from .request import (
    CreateDisk,
    CreateRequest,
    DeleteRequest,
    ReadRequest,
    ServeDisk,
    UndoRequest,
)
from .steps import (
    CheckpointDelete,
    CheckpointRedefine,
    ImageBitmap,
    ImagesCheck,
    ImagesRelease,
    ImagesServe,
    ImagesUnchanged,
    Plan,
    ReadImageMap,
    Step,
)


def create(request: CreateRequest) -> Plan:
    """Make a checkpoint; read the intervals of the disks that have a `since`; serve the data.

    A request with no disks makes no checkpoint, and only serves.
    """
    if request.quiesce is not None:
        raise InvalidRequest(
            "a domain that does not run has no guest agent to quiesce it", hint="leave it out"
        )
    check_name_free(request)
    tops = [(disk, _writable(disk)) for disk in request.disks]
    reads: list[Step] = []
    for disk in request.disks:
        if disk.since is not None and disk.layers is not None:
            reads += _reads(disk.target, disk.since, disk.layers)
    told: tuple[Step, ...] = ()
    if request.tell_libvirt and request.disks:
        told = (CheckpointRedefine(request.name, request.redefinition),)
    served = tuple(_served(disk) for disk in request.serve)
    serve: tuple[Step, ...] = ()
    release: tuple[Step, ...] = ()
    finish: tuple[Step, ...] = ()
    if request.serve:
        serve = (ImagesServe(served),)
        release = (ImagesRelease(),)
        finish = (*release, ImagesUnchanged())
    return Plan(
        EngineName.OFFLINE,
        steps=(
            ImagesCheck(
                tuple((disk.target, top.image) for disk, top in tops),
                tuple((target, image) for target, image, _ in served),
            ),
            *(
                ImageBitmap(disk.target, top.image, "add", request.name, disk.granularity)
                for disk, top in tops
            ),
            *reads,
            *told,
            *serve,
        ),
        finish=finish,
        undo=release
        + undo_create(
            UndoRequest(
                request.name,
                request.redefinition,
                tuple(disk.layers for disk in request.disks if disk.layers is not None),
                told_libvirt=bool(told),
            )
        ),
        release=release,
    )


def _served(disk: ServeDisk) -> tuple[str, str, str]:
    if disk.image is None or disk.format is None:
        raise Unsupported(
            f"disk {disk.target} cannot be read while the domain does not run: it has no image "
            "on this machine whose format is known",
            hint="start the domain",
        )
    return disk.target, disk.image, disk.format


def undo_create(request: UndoRequest) -> tuple[Step, ...]:
    """Take back a create: remove its bitmaps."""
    steps: list[Step] = []
    if request.told_libvirt:
        steps.append(CheckpointDelete(request.name, metadata_only=True, missing_ok=True))
    for disk in request.disks:
        top = top_layer(disk.target, disk)
        steps += [
            ImageBitmap(disk.target, layer.image, "remove", request.name, missing_ok=True)
            for layer in disk.layers
            if layer is top or layer.bitmap(request.name) is not None
        ]
    return tuple(steps)


def delete(request: DeleteRequest) -> Plan:
    """Remove a checkpoint's bitmaps from every layer, whatever state they are in."""
    held = [
        (disk.target, layer.image)
        for disk in request.disks
        if disk.layers is not None and not request.metadata_only
        for layer in disk.layers.holding(request.name)
    ]
    steps: list[Step] = [ImagesCheck(tuple(held))] if held else []
    steps += [ImageBitmap(target, image, "remove", request.name) for target, image in held]
    if request.known_to_libvirt:
        steps.append(CheckpointDelete(request.name, metadata_only=True, missing_ok=True))
    return Plan(EngineName.OFFLINE, tuple(steps))


def read(request: ReadRequest) -> Plan:
    """Read open intervals."""
    steps: list[Step] = []
    for disk in request.disks:
        top_layer(disk.target, disk.layers)
        assert disk.layers is not None  # noqa: S101 -- top_layer() saw to it
        steps += _reads(disk.target, disk.since, disk.layers)
    return Plan(EngineName.OFFLINE, tuple(steps))


def _reads(target: str, since: str, layers: DiskLayers) -> list[Step]:
    reads: list[Step] = []
    for layer in check_readable(target, since, layers):
        bitmap = layer.bitmap(since)
        granularity = None if bitmap is None else bitmap.granularity
        reads.append(ReadImageMap(target, layer.image, since, granularity))
    return reads


def _writable(disk: CreateDisk) -> Layer:
    top = top_layer(disk.target, disk.layers)
    if not disk.persistent or top.format != "qcow2":
        raise Unsupported(
            f"disk {disk.target} cannot be tracked while the domain does not run: "
            f"its image is {top.format or 'of an unknown format'}, which cannot keep bitmaps"
        )
    return top
