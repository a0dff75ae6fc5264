"""Dirty bitmaps as a running QEMU reports them: pure.

From ``query-named-block-nodes``, per node::

    {"node-name": "libvirt-1-format", "drv": "qcow2", "ro": false, "file": "/img/a.qcow2",
     "image": {"virtual-size": 67108864, ...},
     "dirty-bitmaps": [{"name": "c1", "recording": true, "persistent": true, "busy": false,
                        "granularity": 65536, "count": 0}]}

``inconsistent`` is there only where it is true.  Bitmaps without a name belong to jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OperationFailed
from .disk import Bitmap, Disk, DiskLayers, Layer

NodeReport = Mapping[str, Any]


def parse_layers(
    disks: Sequence[Disk], nodes: Mapping[str, Sequence[str]], named: Sequence[NodeReport]
) -> tuple[DiskLayers, ...]:
    """The layers of each of the `disks` that `nodes` has an entry for, in the disks' order.

    nodes -- target -> node names, top first
    named -- the answer to query-named-block-nodes

    Raises OperationFailed if a node went away since its name was learnt, or an entry is not in
    the documented form.
    """
    reports = {report.get("node-name"): report for report in named}
    found = []
    for disk in disks:
        if disk.target not in nodes:
            continue
        layers = []
        for position, node in enumerate(nodes[disk.target]):
            report = reports.get(node)
            if report is None:
                raise OperationFailed(
                    f"block node {node} of disk {disk.target} is not there any more",
                    hint="a block job may just have ended; try again",
                )
            image = disk.chain[position].source if position < len(disk.chain) else None
            layers.append(_layer(report, image))
        found.append(DiskLayers(disk.target, tuple(layers)))
    return tuple(found)


def _layer(report: NodeReport, image: str | None) -> Layer:
    try:
        return Layer(
            image=report["file"] if image is None else image,
            node=report["node-name"],
            format=report.get("drv"),
            size=report["image"]["virtual-size"],
            read_only=bool(report.get("ro")),
            bitmaps=tuple(
                Bitmap(
                    name=bitmap["name"],
                    granularity=bitmap["granularity"],
                    recording=bool(bitmap.get("recording")),
                    persistent=bool(bitmap.get("persistent")),
                    inconsistent=bool(bitmap.get("inconsistent")),
                    busy=bool(bitmap.get("busy")),
                    count=bitmap["count"],
                )
                for bitmap in report.get("dirty-bitmaps", ())
                if bitmap.get("name")
            ),
        )
    except (KeyError, TypeError) as error:
        raise OperationFailed(
            f"query-named-block-nodes answered in an unexpected form: {error!r}"
        ) from None
