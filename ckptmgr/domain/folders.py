"""Where libvirt's QEMU driver keeps its folders (qemu_conf.c).

`library` and `tpm_states` take the driver and the root directory of an embedded one.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..config import Driver
from ..errors import Unsupported


def library(driver: Driver, root: Path | None) -> Path:
    """The folder with one for each running domain, where QEMU has its sockets (libDir)."""
    return _folder(driver, root, embedded="lib/qemu", session="lib", system="qemu")


def tpm_states(driver: Driver, root: Path | None) -> Path:
    """The folder with the state of each domain's TPM, by UUID (swtpmStorageDir)."""
    return _folder(driver, root, embedded="lib/swtpm", session="swtpm", system="swtpm")


def of_domain(base: Path, number: int, name: str, hint: str) -> Path:
    """The folder of a running domain in `base`.  Raises Unsupported where there is none.

    number, name -- the domain's id and name; hint -- what the user can do
    """
    try:
        found = [entry for entry in base.iterdir() if entry.name.startswith(f"domain-{number}-")]
    except OSError as error:
        raise Unsupported(f"{base} cannot be read: {error.strerror}", hint=hint) from error
    if len(found) != 1:
        raise Unsupported(f"{base} has no folder of domain {name!r}", hint=hint)
    return accessible(found[0], name, hint)


def accessible(folder: Path, name: str, hint: str) -> Path:
    """`folder`, for sockets of domain `name`.  Raises Unsupported if we cannot enter it."""
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise Unsupported(
            f"{folder}, for sockets of domain {name!r}, is not a folder that can be entered",
            hint=hint,
        )
    return folder


def _folder(driver: Driver, root: Path | None, *, embedded: str, session: str, system: str) -> Path:
    """What is called so below the folder of each driver."""
    if driver is Driver.EMBEDDED and root is not None:
        return root / embedded
    if driver is Driver.SESSION:
        return _session() / session
    return Path("/var/lib/libvirt") / system


def _session() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".config"
    return base / "libvirt" / "qemu"
