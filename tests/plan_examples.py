"""Disks with bitmaps, as the adapter would report them."""

from __future__ import annotations

from ckptmgr.domain.disk import Bitmap, DiskLayers, Layer

MIB = 1 << 20


def bitmap(
    name: str,
    granularity: int = 65536,
    *,
    recording: bool = True,
    busy: bool = False,
    inconsistent: bool = False,
) -> Bitmap:
    return Bitmap(name, granularity, recording, busy=busy, inconsistent=inconsistent)


def layer(
    number: int,
    *bitmaps: Bitmap,
    image: str | None = None,
    read_only: bool = False,
    size: int = 64 * MIB,
    format: str = "qcow2",
) -> Layer:
    return Layer(
        image=image or f"/img/{number}.{format}",
        node=f"libvirt-{number}-format",
        format=format,
        size=size,
        read_only=read_only,
        bitmaps=bitmaps,
    )


def disk(target: str, *layers: Layer) -> DiskLayers:
    return DiskLayers(target, layers)
