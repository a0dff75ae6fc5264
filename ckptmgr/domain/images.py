"""What local images say of themselves: their headers, and what ``qemu-img info`` reports.

Nothing here takes a lock or writes, so a running QEMU does not mind.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import qcow2
from ..errors import OperationFailed
from .disk import Bitmap, Layer

INFO_TIMEOUT = 60.0

_TABLE_MAX = 64 << 20  # QCOW_MAX_SNAPSHOTS_SIZE is 1 GiB, of which names are little


@contextmanager
def _opened(path: str | Path) -> Iterator[int | None]:
    """A descriptor of the file or block device there; None for anything else.  Raises OSError."""
    # O_NONBLOCK: a path may turn out to be a fifo.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        yield descriptor if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None
    finally:
        os.close(descriptor)


def read_header(path: str | Path) -> qcow2.Header | None:
    """The header of a local image; None if it is no qcow2 (or no regular file or device).

    Raises OSError if it cannot be read.
    """
    with _opened(path) as descriptor:
        try:
            return None if descriptor is None else qcow2.read_header(descriptor)
        except qcow2.Malformed:
            return None


def internal_snapshots(path: str | Path) -> frozenset[str]:
    """Names of the internal snapshots of a local qcow2 image; none of what is no qcow2.

    Reads the table itself; nothing is locked.  Raises OSError, and OperationFailed for a table
    that makes no sense.
    """
    with _opened(path) as descriptor:
        if descriptor is None:
            return frozenset()
        try:
            header = qcow2.read_header(descriptor)
            if header is None or not header.snapshots:
                return frozenset()
            length = min(_TABLE_MAX, 4096 * header.snapshots)
            table = qcow2.read(descriptor, length, header.snapshots_offset)
            return qcow2.parse_snapshots(table, header.snapshots)
        except qcow2.Malformed as error:
            raise OperationFailed(f"the image {path} is damaged: {error}") from error


def raw_size(path: str | Path) -> int | None:
    """The virtual size of a raw image: a regular file's, in whole sectors as QEMU counts; None
    for what is no regular file.  Raises OSError.
    """
    found = Path(path).stat()
    return -(-found.st_size // 512) * 512 if stat.S_ISREG(found.st_mode) else None


def read_chain(path: str, form: str) -> tuple[Layer, ...]:
    """The layers of a local image and their bitmaps, top first, through ``qemu-img info``.

    form -- the image's format as the domain gives it: qemu-img must never probe what a guest
        could have written

    Raises OperationFailed, with qemu-img's message.
    """
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
        raise OperationFailed(f"qemu-img cannot read {path}: {message}")
    return parse_chain(done.stdout.decode(errors="surrogateescape"))


def parse_chain(text: str) -> tuple[Layer, ...]:
    """Parse what ``qemu-img info --output=json --backing-chain`` prints.

        [{"filename": "/img/a.qcow2", "format": "qcow2", "virtual-size": 67108864,
          "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "bitmaps":
            [{"flags": ["auto"], "name": "c1", "granularity": 65536}]}}}, ...]

    Flags: ``auto`` -- the bitmap will record when the image is opened for writing; ``in-use`` --
    it was not closed properly and its contents are worthless.
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
            Bitmap(
                name=bitmap["name"],
                granularity=bitmap["granularity"],
                recording="auto" in bitmap["flags"] and "in-use" not in bitmap["flags"],
                inconsistent="in-use" in bitmap["flags"],
            )
            for bitmap in data.get("bitmaps", ())
        ),
    )
