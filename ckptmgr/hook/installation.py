"""Putting the hook into libvirt's folder, and removing it.

libvirt (6.5 and later) runs ``qemu``, and after it each executable of ``qemu.d`` by name; so the
hook is a file of its own, and others stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import CkptmgrError
from .script import HEAD, Setting, script

DIRECTORY = Path("/etc/libvirt/hooks")
"""Where libvirt looks; compiled into it."""

NAME = "ckptmgr"


@dataclass(frozen=True)
class Status:
    """What is there.

    path -- of the hook
    installed -- it is there, and ours
    current -- it is just what would be installed
    others -- other hooks for QEMU's domains, which are run too
    """

    path: Path
    installed: bool
    current: bool
    others: tuple[str, ...]


def setting(store: Path, python: Path | None = None) -> Setting:
    """What the script is told: this interpreter, and this package."""
    package = Path(__file__).resolve().parent.parent.parent
    python = python or Path(sys.executable)
    if python.name != str(python):  # a name alone is looked for by the hook
        python = python.absolute()
    return Setting(store.absolute(), python, package)


def status(directory: Path, wanted: Setting) -> Status:
    """What is in libvirt's folder.  Raises CkptmgrError where it cannot be read."""
    path = _path(directory)
    text = _read(path)
    executable = text is not None and os.access(path, os.X_OK)
    return Status(
        path,
        installed=executable and text is not None and text.startswith(HEAD),
        current=executable and text == script(wanted),
        others=_others(directory),
    )


def place(directory: Path) -> Path:
    """Where the hook is to be.  Raises CkptmgrError where something else has its name."""
    path = _path(directory)
    _check_ours(path, _read(path))
    return path


def install(directory: Path, wanted: Setting) -> Path:
    """Write the hook, or write it anew.

    Raises CkptmgrError where it cannot be written or something else has its name.
    """
    path = place(directory)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        # Never a moment in which libvirt could run half of it.
        with temporary.open("x", encoding="utf-8") as file:
            file.write(script(wanted))
            os.fchmod(file.fileno(), 0o755)
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CkptmgrError(
            f"the hook {path} cannot be written: {error.strerror}", hint="run as root"
        ) from error
    return path


def uninstall(directory: Path) -> bool:
    """Remove the hook; False if there is none.

    Raises CkptmgrError where it cannot be removed or something else has its name.
    """
    path = place(directory)
    try:
        # What an install that was killed left is a hook, too, if it came that far.
        _temporary(path).unlink(missing_ok=True)
        if _read(path) is None:
            return False
        path.unlink()
    except OSError as error:
        raise CkptmgrError(
            f"the hook {path} cannot be removed: {error.strerror}", hint="run as root"
        ) from error
    return True


def _path(directory: Path) -> Path:
    return directory.absolute() / "qemu.d" / NAME


def _temporary(path: Path) -> Path:
    return path.with_name(f".{NAME}.new")


def _check_ours(path: Path, text: str | None) -> None:
    if text is not None and not text.startswith(HEAD):
        raise CkptmgrError(
            f"{path} is a hook that ckptmgr did not write, and stays as it is",
            hint="move it to another name",
        )


def _read(path: Path) -> str | None:
    """The text of a file, None if there is none; of what is no text, nothing that is ours."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CkptmgrError(f"{path} cannot be read: {error.strerror}") from error


def _others(directory: Path) -> tuple[str, ...]:
    ours = _path(directory)
    found = [ours.parent.with_name("qemu")]
    with contextlib.suppress(OSError):
        found += sorted(ours.parent.iterdir())
    return tuple(
        str(path)
        for path in found
        if path not in (ours, _temporary(ours)) and path.is_file() and os.access(path, os.X_OK)
    )
