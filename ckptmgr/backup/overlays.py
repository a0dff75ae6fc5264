"""Overlays on a point's images, which `restore` makes: as long as one is there the point stays.

overlays.json   [{"path": "/var/lib/libvirt/images/web.qcow2", "created": 1795338000}]

An entry counts while its file is there and names one of the point's images as its backing file.
Where that cannot be told, it counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import RepositoryDamaged
from ..store import files
from .failure import failing, of_the_repository
from .header import read_header

RECORD = "overlays.json"
"""Name of the record in a point's folder."""


def standing(folder: Path, images: Iterable[str]) -> tuple[str, ...]:
    """The paths of the overlays that stand on `images` in a point's `folder`.

    Raises RepositoryDamaged where the record cannot be read, RepositoryFailed.
    """
    named = {str(entry["path"]) for entry in recorded(folder)}
    wanted = [folder / image for image in images]
    return tuple(sorted(name for name in named if _stands(Path(name), wanted)))


def record(folder: Path, overlays: Iterable[Path]) -> None:
    """Add overlays to those of a point; to be called under the lineage's lock, which is to be held
    until they are there.

    Raises RepositoryDamaged where the record cannot be read, RepositoryFailed.
    """
    new = [str(path) for path in overlays]
    entries = [entry for entry in recorded(folder) if entry["path"] not in new]
    now = int(time.time())
    entries += [{"path": path, "created": now} for path in new]
    with of_the_repository():
        files.write(folder / RECORD, json.dumps(entries, indent=2).encode() + b"\n")


def recorded(folder: Path) -> list[dict[str, object]]:
    """The entries of a point's record.

    Raises RepositoryDamaged where it cannot be read, RepositoryFailed.
    """
    path = folder / RECORD
    with failing(path, "cannot be read"), of_the_repository():
        try:
            entries = json.loads(files.read(path))
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError):
            raise RepositoryDamaged(
                f"{path} cannot be read: it is not JSON",
                hint="remove it if nothing that was restored stands on the point",
            ) from None
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("path"), str)
    ]


def _stands(overlay: Path, images: list[Path]) -> bool:
    try:
        header = read_header(overlay)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, RepositoryDamaged, ValueError):
        return True
    if header is None or header.backing_file is None:
        return False
    backing = header.backing_file.removeprefix("file:")
    if backing.startswith(("json:", "nbd:")):
        return True
    real = os.path.realpath(overlay.parent / backing)
    return any(real == os.path.realpath(image) for image in images)
