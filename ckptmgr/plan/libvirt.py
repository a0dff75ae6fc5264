"""Plans for libvirt's checkpoint and backup APIs: no monitor, so the domain is not tainted.

A plain create makes the bitmaps alone.  Where it ends an interval, a pull backup job with a
checkpoint makes the checkpoint and freezes the interval's dirty bitmap at one instant, to be
read over NBD (libvirt 7.2 and later).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lxml import etree

from ..checkpoint import EngineName
from ..errors import OperationFailed
from ..xml import parse, to_text
from .checks import check_server
from .request import (
    CreateDisk,
    CreateRequest,
    DeleteRequest,
    ReadDisk,
    ReadRequest,
    ServeDisk,
    UndoRequest,
)
from .steps import (
    BackupBegin,
    BackupEnd,
    CheckpointCreate,
    CheckpointDelete,
    CheckpointPurge,
    CheckpointRedefine,
    DataServed,
    Export,
    Plan,
    Quiesced,
    ReadMaps,
    Server,
    Step,
    TcpServer,
)


def create(request: CreateRequest) -> Plan:
    """Make a checkpoint; read the intervals of the disks that have a `since`; serve the data.

    A request with no disks makes no checkpoint, and only serves.
    """
    undo = undo_create(UndoRequest(request.name, request.redefinition, socket=request.socket))
    ending = [disk for disk in request.disks if disk.since is not None]
    begin: CheckpointCreate | BackupBegin
    rest: list[Step] = []
    finish: tuple[Step, ...] = ()
    if not ending and not request.serve:
        begin = CheckpointCreate(request.document)
    else:
        server = check_server(request.socket)
        document = request.document if request.disks else None
        begin = BackupBegin(_backup(server, ending, request.serve), document)
        finish = (BackupEnd(server),)
        if ending:
            rest.append(ReadMaps(server, _exports(server, ending)))
        if request.serve:
            names = tuple((disk.target, _export(server, disk.target)) for disk in request.serve)
            rest.append(DataServed(server, names))
        else:
            rest += finish
            finish = ()
    first: Step = begin if request.quiesce is None else Quiesced(begin, request.quiesce)
    release = tuple(step for step in undo if isinstance(step, BackupEnd))
    return Plan(
        EngineName.LIBVIRT,
        steps=(first, *rest),
        undo=undo if request.disks else release,
        release=release,
        finish=finish,
    )


def undo_create(request: UndoRequest) -> tuple[Step, ...]:
    """Take back a create: end its job, remove the checkpoint with its bitmaps."""
    job = () if request.socket is None else (BackupEnd(request.socket),)
    return (*job, CheckpointPurge(request.name, request.redefinition))


def delete(request: DeleteRequest) -> Plan:
    """Delete a checkpoint.

    libvirt deletes nothing where the bitmap of any disk is missing (its INTERNAL_ERROR "bitmap
    ... not found in backing chain of ...", which the engine raises as BitmapBroken with the
    disk): those disks are then taken out of its metadata first.
    """
    if request.metadata_only:
        known = request.known_to_libvirt
        steps: tuple[Step, ...] = (forget(request.name),) if known else ()
        return Plan(EngineName.LIBVIRT, steps)
    held = [
        disk.target
        for disk in request.disks
        if not disk.missing and (disk.layers is None or disk.layers.holding(request.name))
    ]
    if not held:
        steps = (forget(request.name),) if request.known_to_libvirt else ()
        note = f"no disk has a bitmap of checkpoint {request.name}: its metadata alone is deleted"
        return Plan(EngineName.LIBVIRT, steps, notes=(note,))
    if request.known_to_libvirt and len(held) == len(request.disks):
        return Plan(EngineName.LIBVIRT, (CheckpointDelete(request.name),))
    if request.redefinition is None:
        raise OperationFailed(
            f"checkpoint {request.name} cannot be shown to libvirt for its deletion: "
            "there is no document of it"
        )
    shown = with_disks(request.redefinition, held)
    missing = [disk.target for disk in request.disks if disk.target not in held]
    notes = (f"no bitmap of checkpoint {request.name} on {', '.join(missing)}",) if missing else ()
    return Plan(
        EngineName.LIBVIRT,
        (CheckpointRedefine(request.name, shown), CheckpointDelete(request.name)),
        notes=notes,
    )


def forget(name: str) -> CheckpointDelete:
    """Delete libvirt's metadata of a checkpoint, if it has any."""
    return CheckpointDelete(name, metadata_only=True, missing_ok=True)


DISCARD = "ckptmgr-discard"
"""Name of the checkpoint that libvirt is shown for a moment to remove a bitmap through it."""


def discard(bitmap: str, targets: Iterable[str]) -> tuple[Step, ...]:
    """Remove a bitmap of any name from disks, which may not have it, and leave all else alone.

    libvirt removes the bitmap that a checkpoint's document names (7.0 to 11.3); so a checkpoint
    that nothing stands on is shown to it with that bitmap, and deleted.  Neither the relations
    of the other checkpoints nor libvirt's current one change.

        <domaincheckpoint>
          <name>ckptmgr-discard</name>
          <creationTime>1</creationTime>
          <disks>
            <disk name='vda' checkpoint='bitmap' bitmap='c1'/>
          </disks>
        </domaincheckpoint>
    """
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = DISCARD
    etree.SubElement(root, "creationTime").text = "1"
    disks = etree.SubElement(root, "disks")
    for target in targets:
        etree.SubElement(disks, "disk", name=target, checkpoint="bitmap", bitmap=bitmap)
    if not len(disks):
        return ()
    # What an interrupted removal left would be taken for this one.
    return (forget(DISCARD), CheckpointPurge(DISCARD, to_text(root)))


def read(request: ReadRequest) -> Plan:
    """Read open intervals, all of one instant, through a pull backup job."""
    server = check_server(request.socket)
    end = BackupEnd(server)
    return Plan(
        EngineName.LIBVIRT,
        steps=(
            BackupBegin(_backup(server, request.disks), checkpoint=None),
            ReadMaps(server, _exports(server, request.disks)),
            end,
        ),
        undo=(end,),
        release=(end,),
    )


def _bitmap(target: str) -> str:
    """Name of the temporary bitmap that the backup job makes; libvirt's own default."""
    return f"backup-{target}"


_OURS = "ckptmgr-"


def _export(server: Server, target: str) -> str:
    """Name of a disk's export.  A socket is ours by its path, an address by what it exports."""
    return f"{_OURS}{target}" if isinstance(server, TcpServer) else target


def _exports(server: Server, disks: Iterable[CreateDisk | ReadDisk]) -> tuple[Export, ...]:
    return tuple(
        Export(
            disk.target,
            name=_export(server, disk.target),
            bitmap=_bitmap(disk.target),
            granularity=(
                disk.granularity if isinstance(disk, ReadDisk) else disk.since_granularity
            ),
        )
        for disk in disks
    )


def _backup(
    server: Server,
    disks: Iterable[CreateDisk | ReadDisk],
    serve: Iterable[ServeDisk] = (),
) -> str:
    """The document for virDomainBackupBegin (domainbackup.rng); disks not listed take no part.

        <domainbackup mode='pull'>
          <server transport='unix' socket='/run/x.sock'/>
          <disks>
            <disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c1'
                  exportname='vda' exportbitmap='backup-vda'>
              <driver type='qcow2'/>
              <scratch file='/run/x-vda.scratch'/>
            </disk>
          </disks>
        </domainbackup>

    A disk of which only the data is wanted has backupmode='full', and no bitmap.

    The scratch file is always named: without, libvirt would put it beside the image (or fail, for
    a disk that is listed: 9.0).  Over the network it is

          <server transport='tcp' tls='yes' name='192.0.2.7' port='10809'/>
    """
    root = etree.Element("domainbackup", mode="pull")
    if isinstance(server, TcpServer):
        place = {"name": server.host, "port": str(server.port)}
        etree.SubElement(
            root, "server", transport="tcp", tls="yes" if server.tls else "no", attrib=place
        )
    else:
        etree.SubElement(root, "server", transport="unix", socket=server)
    listed = etree.SubElement(root, "disks")
    ending = {disk.target: disk for disk in disks}
    every = {disk.target: disk.scratch for disk in (*serve, *ending.values())}
    for target, scratch in every.items():
        if scratch is None:
            raise OperationFailed(f"there is no place for a scratch file of disk {target}")
        element = etree.SubElement(listed, "disk", name=target, backup="yes", type="file")
        if target in ending:
            element.set("backupmode", "incremental")
            element.set("incremental", ending[target].since or "")
        else:
            element.set("backupmode", "full")
        element.set("exportname", _export(server, target))
        if target in ending:
            element.set("exportbitmap", _bitmap(target))
        etree.SubElement(element, "driver", type="qcow2")
        etree.SubElement(element, "scratch", file=scratch)
    return to_text(root)


def serves(job: str, server: Server) -> bool:
    """Whether a backup job is one of ours that serves at `server`.

    job -- its document, as of virDomainBackupGetXMLDesc
    """
    root = parse(job, what="the backup job")
    found = root.find("server")
    if found is None:
        return False
    if isinstance(server, str):
        return found.get("socket") == server
    exports = [disk.get("exportname", "") for disk in root.iterfind("disks/disk[@backup='yes']")]
    return (found.get("name"), found.get("port")) == (server.host, str(server.port)) and all(
        name.startswith(_OURS) for name in exports
    )


def tracked_disks(document: str) -> tuple[str, ...]:
    """Targets of the disks that have a bitmap in a checkpoint document of libvirt's form."""
    disks = parse(document, what="the checkpoint").iterfind("disks/disk")
    return tuple(
        name for disk in disks if disk.get("checkpoint") != "no" and (name := disk.get("name"))
    )


def with_disks(document: str, targets: Collection[str]) -> str:
    """A checkpoint document in which only the disks in `targets` keep their bitmap."""
    root = parse(document, what="the checkpoint")
    for disk in root.iterfind("disks/disk"):
        if disk.get("name") not in targets:
            disk.set("checkpoint", "no")
            for attribute in ("bitmap", "size"):
                disk.attrib.pop(attribute, "")
    return to_text(root)
