"""The backing chain of a local image, with the bitmaps that its layers hold.

Where all layers are raw or qcow2 files of the usual kind, they are read here: a command looks at
each disk's chain, and a process for each would cost it more than all else.  Whatever QEMU might
see otherwise, or refuse, is asked of ``qemu-img info``.  Nothing here takes a lock or writes.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from .. import qcow2
from ..errors import OperationFailed
from .disk import Bitmap, Layer
from .images import opened

INFO_TIMEOUT = 60.0
"""Seconds for qemu-img to report."""

_PATH_MAX = 4095
_L1_MAX = 32 << 20  # QCOW_MAX_L1_SIZE, in bytes
_REFCOUNTS_MAX = 8 << 20  # QCOW_MAX_REFTABLE_SIZE, in bytes


def read_chain(path: str, form: str) -> tuple[Layer, ...]:
    """The layers of a local image and their bitmaps, top first.

    form -- the image's format as the domain gives it: no one must ever probe what a guest could
        have written

    Raises OperationFailed, with qemu-img's message.
    """
    return read_here(path, form) or ask(path, form)


# --- read here -----------------------------------------------------------------------------------


def read_here(path: str, form: str) -> tuple[Layer, ...] | None:
    """The chain, or None where one of its layers is for qemu-img to judge."""
    layers: list[Layer] = []
    seen: set[str] = set()
    image: str | None = path
    while image is not None:
        if image in seen or not plain_name(image):
            return None
        seen.add(image)
        try:
            found = _read_layer(image, form)
        except (OSError, qcow2.Malformed):
            return None
        if found is None:
            return None
        layer, header = found
        layers.append(layer)
        if header is None or header.backing_file is None:
            return tuple(layers)
        if header.backing_format is None:
            return None  # QEMU would look into the file
        form = header.backing_format
        image = beside(image, header.backing_file)
    return None


def _read_layer(path: str, form: str) -> tuple[Layer, qcow2.Header | None] | None:
    with opened(path) as descriptor:
        if descriptor is None:
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        if form == "raw":
            size = -(-status.st_size // qcow2.SECTOR) * qcow2.SECTOR
            return Layer(path, format=form, size=size), None
        header = qcow2.read_header(descriptor) if form == "qcow2" else None
        if header is None or not plain(header):
            return None
        qcow2.read_snapshots(descriptor, header)  # if they cannot be read, QEMU refuses the image
        bitmaps = qcow2.read_bitmaps(descriptor, header)
    if not all(bitmap.name.isprintable() for bitmap in bitmaps):
        return None
    layer = Layer(
        path,
        format=form,
        size=header.size,
        bitmaps=tuple(
            _bitmap(bitmap.name, bitmap.granularity, auto=bitmap.auto, in_use=bitmap.in_use)
            for bitmap in bitmaps
        ),
    )
    return layer, header


def plain_name(path: str) -> bool:
    """Whether QEMU takes `path` for nothing but the path of a file, and reports it as it is."""
    return path.startswith("/") and path.isprintable() and len(os.fsencode(path)) <= _PATH_MAX


def beside(image: str, backing: str) -> str:
    """What QEMU makes of the name of a backing file: relative to its image.  Names of another
    kind, such as ``json:``, stay what they are.
    """
    if backing.startswith("/") or ":" in backing.partition("/")[0]:
        return backing
    return image[: image.rindex("/") + 1] + backing


def plain(header: qcow2.Header) -> bool:
    """Whether QEMU opens an image with this header without a word, and with nothing else."""
    cluster = header.cluster_size
    kind = header.incompatible, header.compression
    l2_covers = cluster * (cluster // 8)
    tables = (
        (header.l1_offset, header.l1_length * 8, _L1_MAX),
        (header.refcounts_offset, header.refcounts_length * cluster, _REFCOUNTS_MAX),
        (header.snapshots_offset if header.snapshots else 0, 0, 0),
    )
    return (
        header.encryption == 0
        and kind in ((0, 0), (qcow2.COMPRESSION_TYPE, qcow2.ZSTD))
        and header.length in (72, 104, 112)
        and header.refcount_order <= 6
        and header.refcounts_length > 0
        and header.size % qcow2.SECTOR == 0
        and header.l1_length * l2_covers >= header.size
        and all(
            offset % cluster == 0 and offset < 1 << 56 and length <= most
            for offset, length, most in tables
        )
    )


# --- asked of qemu-img ---------------------------------------------------------------------------


def ask(path: str, form: str) -> tuple[Layer, ...]:
    """The chain as ``qemu-img info`` reports it.  Raises OperationFailed."""
    import subprocess  # only where qemu-img is run

    command = ["qemu-img", "info", "--output=json", "--backing-chain", "-U", "-f", form, path]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=INFO_TIMEOUT,
        )
    except FileNotFoundError:
        raise OperationFailed(
            "qemu-img is not installed", hint="install qemu-utils (Debian) or qemu-img (Fedora)"
        ) from None
    except subprocess.TimeoutExpired:
        raise OperationFailed(
            f"qemu-img did not read {path} within {INFO_TIMEOUT:g} s",
            hint="see that the storage answers",
        ) from None
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        other = f"Image is not in {form} format" in message
        raise OperationFailed(
            f"qemu-img cannot read {path}: {message}",
            hint=f"the domain's definition says {form}; if it holds a raw disk now, as after a "
            "restore onto a device, change that: virsh edit"
            if other
            else None,
        )
    return parse_chain(done.stdout.decode(errors="surrogateescape"))


def parse_chain(text: str) -> tuple[Layer, ...]:
    """Parse what ``qemu-img info --output=json --backing-chain`` prints.

        [{"filename": "/img/a.qcow2", "format": "qcow2", "virtual-size": 67108864,
          "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "bitmaps":
            [{"flags": ["auto"], "name": "c1", "granularity": 65536}]}}}, ...]

    Flags: as `qcow2.BitmapEntry` describes them.
    """
    try:
        return tuple(_layer(entry) for entry in json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperationFailed(f"qemu-img's report is not in the expected form: {error!r}") from None


def _layer(entry: dict[str, Any]) -> Layer:
    data = entry.get("format-specific", {}).get("data", {})
    return Layer(
        image=entry["filename"],
        format=entry["format"],
        size=entry["virtual-size"],
        bitmaps=tuple(
            _bitmap(
                bitmap["name"],
                bitmap["granularity"],
                auto="auto" in bitmap["flags"],
                in_use="in-use" in bitmap["flags"],
            )
            for bitmap in data.get("bitmaps", ())
        ),
    )


def _bitmap(name: str, granularity: int, *, auto: bool, in_use: bool) -> Bitmap:
    return Bitmap(name, granularity, recording=auto and not in_use, inconsistent=in_use)
