"""Which block node of QEMU is which layer of a disk: pure, and never a guess.

Where libvirt runs QEMU with ``-blockdev`` it names the nodes itself and says so in the live XML:
``index='N'`` is ``libvirt-N-format`` over ``libvirt-N-storage``.  There `assigned_nodes` is used,
and detection would be wrong: nothing in QEMU's answers tells more than libvirt knows.

Where it runs QEMU with ``-drive`` (libvirt before 8 on an old QEMU, or told to) the names are
QEMU's own (``#block165``).  There, and only there, `detect_nodes` matches QMP's answers.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..errors import NodeUnknown
from .disk import Disk, Image

Answer = Sequence[Mapping[str, Any]]

# Nodes that QEMU or a job puts above or between the images.
FILTERS = frozenset(
    {
        "backup-top",  # before 6.1; then copy-before-write
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "preallocate",
        "throttle",
    }
)

# Their images are served by another process, or are no images: QEMU has no node to track.
NODELESS = frozenset({"vhostuser", "vhostvdpa"})


def has_node(disk: Disk) -> bool:
    """Whether QEMU has a block node with an image for this disk at all."""
    return not disk.empty and disk.top.type not in NODELESS


def on_blockdev(disks: Sequence[Disk], blocks: Answer | None = None) -> bool | None:
    """Whether a running domain's disks are on ``-blockdev``; None if that cannot be told yet.

    disks -- of the live XML: libvirt writes an ``index`` on the source of each disk that it has
        on -blockdev.  (`sd` cards are always on -drive.)
    blocks -- the answer to query-block, if the XML alone did not tell: a -drive has a device
        name, ``drive-<alias>``, a -blockdev has none

    Raises NodeUnknown if the two contradict each other from one disk to the next.
    """
    counted = [disk for disk in disks if disk.bus != "sd"]
    indexed = {disk.target: disk.top.index is not None for disk in counted if has_node(disk)}
    answers = set(indexed.values())
    if len(answers) == 1:
        return answers.pop()
    if blocks is None:
        return None
    devices = {block.get("device") for block in blocks}
    named = {disk.target: drive_name(disk) in devices for disk in counted if disk.alias}
    for disk in counted:
        if disk.target in indexed and indexed[disk.target] == named.get(disk.target):
            raise NodeUnknown(
                f"disk {disk.target}: libvirt's XML and QEMU disagree on whether it is a -blockdev"
            )
    kinds = set(named.values())
    if kinds == {True, False}:
        mixed = ", ".join(sorted(target for target, drive in named.items() if drive))
        raise NodeUnknown(
            f"some disks are on -drive ({mixed}) and the others on -blockdev",
            hint="restart the domain, so that libvirt starts all of its disks the same way",
        )
    # Nothing that either would name: libvirt without -blockdev names even an empty drive.
    return kinds != {True}


def drive_name(disk: Disk) -> str:
    """The device name that libvirt gives a ``-drive``."""
    return f"drive-{disk.alias}"


def format_node(image: Image) -> str | None:
    """The node that libvirt puts a bitmap of `image` on, by its index alone; None if that
    takes a look at QEMU: raw images have a format node or not, as libvirt's version has it.
    """
    if image.index is None or image.format in (None, "raw"):
        return None
    return f"libvirt-{image.index}-format"


def assigned_nodes(disks: Sequence[Disk], named: Answer) -> dict[str, tuple[str, ...]]:
    """The node of each layer, top first, as libvirt assigned them (-blockdev).

    disks -- those asked for, of the live XML
    named -- the answer to query-named-block-nodes: the topmost node of a layer is its format
        node; a raw image of a newer libvirt has none, and its slice or storage node is it

    Raises NodeUnknown, with the disk, if a layer has no index or QEMU has none of its nodes.
    """
    present = {report.get("node-name") for report in named}
    found: dict[str, tuple[str, ...]] = {}
    for disk in disks:
        nodes = []
        for image in disk.chain:
            if image.index is None:
                raise _unknown(disk, f"libvirt gives no index for {image.source}")
            names = (f"libvirt-{image.index}-{part}" for part in ("format", "slice-sto", "storage"))
            node = next((name for name in names if name in present), None)
            if node is None:
                raise _unknown(disk, f"QEMU has no node libvirt-{image.index}-* ({image.source})")
            nodes.append(node)
        found[disk.target] = tuple(nodes)
    _no_node_twice(found)
    return found


def same_text(one: str, other: str) -> bool:
    """Whether two local paths are spelled the same, but for ``.``, ``..`` and slashes."""
    return posixpath.normpath(one) == posixpath.normpath(other)


def detect_nodes(
    disks: Sequence[Disk],
    blocks: Answer,
    stats: Answer,
    named: Answer,
    *,
    wanted: Collection[str] | None = None,
    same: Callable[[str, str], bool] = same_text,
) -> dict[str, tuple[str, ...]]:
    """The node of each layer, top first, by matching QMP's answers (-drive).

    disks -- all of the domain's, of the live XML
    blocks, stats, named -- the answers to query-block, query-blockstats and
        query-named-block-nodes, in any order
    wanted -- targets of the disks asked for; None: every disk that has a node
    same -- whether two local file names are one file

    A disk is the device ``drive-<alias>``; query-block's `qdev` must name the same alias.  From
    there down, filters skipped, each layer's file and driver must be those of the XML's chain.

    Raises NodeUnknown, with the disk, for anything missing, ambiguous or contradicting.
    """
    chosen = [
        disk for disk in disks if has_node(disk) and (wanted is None or disk.target in wanted)
    ]
    for disk in chosen:
        _alone_on_its_image(disk, disks, same)
    reports: dict[str, Mapping[str, Any]] = {}
    doubtful: set[str] = set()
    for report in named:
        name = report.get("node-name", "")
        if name in reports and reports[name].get("file") != report.get("file"):
            doubtful.add(name)
        reports[name] = report
    found: dict[str, tuple[str, ...]] = {}
    for disk in chosen:
        item = _device(disk, blocks, stats)
        layers = _walk(disk, item, reports, doubtful)
        _compare(disk, layers, reports, same)
        found[disk.target] = tuple(layers)
    _no_node_twice(found)
    return found


def _unknown(disk: Disk, why: str) -> NodeUnknown:
    return NodeUnknown(f"the block node of disk {disk.target} cannot be told: {why}")


def _no_node_twice(found: Mapping[str, Sequence[str]]) -> None:
    owner: dict[str, str] = {}
    for target in sorted(found):
        for node in found[target]:
            if node in owner:
                raise NodeUnknown(
                    f"the block nodes of disks {owner[node]} and {target} cannot be told apart: "
                    f"both have {node}"
                )
            owner[node] = target


def _alone_on_its_image(
    disk: Disk, disks: Sequence[Disk], same: Callable[[str, str], bool]
) -> None:
    """A writable image that another disk has as well gives the same answers for both."""
    if disk.read_only:
        return
    for other in disks:
        if other.target == disk.target or not has_node(other):
            continue
        if any(_one_image(disk.top, image, same) for image in other.chain):
            raise NodeUnknown(
                f"the block node of disk {disk.target} cannot be told: disk {other.target} is on "
                f"the same image, {disk.top.source}",
                hint="leave both disks out, or give each an image of its own",
            )


def _one_image(one: Image, other: Image, same: Callable[[str, str], bool]) -> bool:
    if one.path is not None and other.path is not None:
        return same(one.path, other.path)
    return one.source == other.source


def _device(disk: Disk, blocks: Answer, stats: Answer) -> Mapping[str, Any]:
    """The one entry of query-blockstats for this disk, seen to agree with query-block's."""
    if disk.alias is None:
        raise _unknown(disk, "libvirt gives no alias for it")
    device = drive_name(disk)
    by_device = [block for block in blocks if block.get("device") == device]
    items = [item for item in stats if item.get("device") == device]
    if not by_device or not items:
        raise _unknown(disk, f"QEMU has no device {device}")
    if len(by_device) > 1 or len(items) > 1:
        raise _unknown(disk, f"QEMU has several devices {device}")
    block, item = by_device[0], items[0]
    for qdev in (block.get("qdev"), item.get("qdev")):
        # "virtio-disk0", or "/machine/peripheral/virtio-disk0/virtio-backend"
        if qdev is not None and disk.alias not in str(qdev).split("/"):
            raise _unknown(disk, f"device {device} belongs to {qdev}")
    inserted = block.get("inserted")
    if not inserted:
        raise _unknown(disk, f"device {device} is empty, and libvirt has {disk.top.source} in it")
    node = inserted.get("node-name")
    if not node or node != item.get("node-name"):
        raise _unknown(disk, f"QEMU does not name the node of device {device}")
    return item


def _walk(
    disk: Disk,
    item: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
    doubtful: Collection[str],
) -> list[str]:
    """The format nodes from a device down, filters skipped."""
    nodes: list[str] = []
    layer: Mapping[str, Any] | None = item
    while layer:
        node = layer.get("node-name")
        report = reports.get(node or "")
        if not node or report is None or node in doubtful:
            raise _unknown(disk, f"QEMU does not describe layer {len(nodes)} of its chain")
        if node in nodes:
            raise _unknown(disk, f"node {node} comes twice in its chain")
        if report.get("drv") in FILTERS:
            # The filtered node is its backing (jobs) or its file (throttle), "parent" here.
            layer = layer.get("backing") or layer.get("parent")
            continue
        nodes.append(node)
        layer = layer.get("backing")
    return nodes


def _compare(
    disk: Disk,
    nodes: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    same: Callable[[str, str], bool],
) -> None:
    if len(nodes) < len(disk.chain) or (disk.chain_known and len(nodes) != len(disk.chain)):
        raise _unknown(
            disk, f"libvirt has a chain of {len(disk.chain)} images and QEMU one of {len(nodes)}"
        )
    for image, node in zip(disk.chain, nodes, strict=False):
        report = reports[node]
        driver = report.get("drv")
        if image.format is not None and driver != image.format:
            raise _unknown(
                disk, f"{image.source} is {image.format} for libvirt and node {node} is {driver}"
            )
        file = str(report.get("file", ""))
        path = local_path(file)
        # Images without a path are spelled in too many ways to compare: "rbd:pool/image",
        # "json:{...}".  Alias, order and driver agree; that the kind does is still to be seen.
        agrees = path is None if image.path is None else path is not None and same(image.path, path)
        if image.type == "volume" and image.path is None:
            agrees = True
        if not agrees:
            raise _unknown(disk, f"libvirt has {image.source} where QEMU has {file or 'no file'}")


def local_path(file: str) -> str | None:
    """The path in a file name of QEMU's, None if it names no local file.

    ``/img/a.qcow2``, ``file:/img/a.qcow2``, or ``json:{"driver": "qcow2", "file": {"driver":
    "file", "filename": "/img/a.qcow2"}}`` where options were given that a name cannot hold.
    """
    if file.startswith("json:"):
        try:
            options = json.loads(file.removeprefix("json:"))
        except ValueError:
            return None
        while isinstance(options, dict):
            name = options.get("filename") or options.get("file.filename")
            if isinstance(name, str):
                return local_path(name)
            options = options.get("file")
        return None
    for protocol in ("file:", "host_device:"):
        file = file.removeprefix(protocol)
    return file if file.startswith("/") else None
