"""Where libvirt's QEMU driver keeps its folders (qemu_conf.c).

Each function takes the driver and the root directory of an embedded one.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..config import Driver


def library(driver: Driver, root: Path | None) -> Path:
    """The folder with one for each running domain, where QEMU has its sockets (libDir)."""
    return _folder(driver, root, embedded="lib/qemu", session="lib", system="qemu")


def tpm_states(driver: Driver, root: Path | None) -> Path:
    """The folder with the state of each domain's TPM, by UUID (swtpmStorageDir)."""
    return _folder(driver, root, embedded="lib/swtpm", session="swtpm", system="swtpm")


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
