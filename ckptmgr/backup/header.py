"""The header of an image in a repository: what else a program that opens it will open.

It is read here, and not by a program of QEMU's, because that would open the file that the header
names, whatever that is.
"""

from __future__ import annotations

import os
from pathlib import Path

from .. import qcow2
from ..errors import RepositoryDamaged, StoreDamaged
from ..store import files


def read_header(path: Path) -> qcow2.Header | None:
    """The header of the image at `path`; None if that is no qcow2 image.

    Raises OSError, and RepositoryDamaged for what is no file or has an impossible header.
    """
    try:
        descriptor = files.open_regular(path)
    except StoreDamaged as error:
        raise RepositoryDamaged(error.message) from error
    try:
        return qcow2.read_header(descriptor)
    except qcow2.Malformed as error:
        raise RepositoryDamaged(f"the header of {path} is damaged: {error}") from error
    finally:
        os.close(descriptor)
