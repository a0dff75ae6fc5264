"""Directories and settings, and nothing else."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path

from .errors import InvalidRequest


class Driver(StrEnum):
    """Which of libvirt's QEMU drivers a connection talks to."""

    SYSTEM = "system"
    SESSION = "session"
    EMBEDDED = "embedded"


SYSTEM_STORE = Path("/var/lib/ckptmgr")
SYSTEM_SETTINGS = Path("/etc/ckptmgr.toml")


@dataclass(frozen=True)
class Settings:
    """Settings of ``ckptmgr.toml``, all optional.

    store -- the metadata directory
    socket_directory -- where QEMU may bind a socket and this process can reach it; by default
        libvirt's own folder of the running domain, which stock security policies allow
    lock_timeout -- seconds to wait for another process that works on the same domain
    freeze_timeout -- seconds that file systems may take to freeze and may stay frozen
    keep_bitmaps -- how many bitmaps each disk keeps when a checkpoint is made; the older ones
        are archived.  0: all
    """

    store: Path | None = None
    socket_directory: Path | None = None
    lock_timeout: float = 30.0
    freeze_timeout: float = 10.0
    keep_bitmaps: int = 0


def store_directory(
    driver: Driver, embedded_root: Path | None, environment: Mapping[str, str] = os.environ
) -> Path:
    """The default metadata directory.

    ``CKPTMGR_STORE``, else ``/var/lib/ckptmgr`` for the system driver, ``ckptmgr`` in the XDG
    state directory for the session driver, ``ROOT/lib/ckptmgr`` for an embedded root.
    """
    chosen = environment.get("CKPTMGR_STORE")
    if chosen:
        return Path(chosen)
    if driver is Driver.EMBEDDED and embedded_root is not None:
        return embedded_root / "lib" / "ckptmgr"
    if driver is Driver.SESSION:
        return _xdg("XDG_STATE_HOME", ".local/state", environment) / "ckptmgr"
    return SYSTEM_STORE


def settings_file(
    driver: Driver, embedded_root: Path | None, environment: Mapping[str, str] = os.environ
) -> Path:
    """Where the settings of a driver are: beside libvirt's own configuration."""
    if driver is Driver.EMBEDDED and embedded_root is not None:
        return embedded_root / "etc" / "ckptmgr.toml"
    if driver is Driver.SESSION:
        return _xdg("XDG_CONFIG_HOME", ".config", environment) / "ckptmgr.toml"
    return SYSTEM_SETTINGS


def read_settings(path: Path) -> Settings:
    """Read a settings file; a missing one gives the defaults.

    Raises InvalidRequest for one that cannot be read, an unknown key or a wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"the settings {path} cannot be read: {error}") from error
    return _parse(document, path)


def _parse(document: Mapping[str, object], path: Path) -> Settings:
    known = {field.name for field in fields(Settings)}
    settings = Settings()
    for key, value in document.items():
        if key not in known:
            raise InvalidRequest(
                f"{path}: there is no setting {key!r}", hint=f"settings: {', '.join(sorted(known))}"
            )
        if key in ("store", "socket_directory"):
            if not isinstance(value, str) or not Path(value).is_absolute():
                raise InvalidRequest(f"{path}: {key} must be an absolute path, not {value!r}")
            settings = replace(settings, **{key: Path(value)})  # type: ignore[arg-type]
        elif key == "keep_bitmaps":
            if type(value) is not int or value < 0:
                raise InvalidRequest(f"{path}: {key} must be a whole number, not {value!r}")
            settings = replace(settings, keep_bitmaps=value)
        else:
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InvalidRequest(f"{path}: {key} must be a number of seconds, not {value!r}")
            settings = replace(settings, **{key: float(value)})  # type: ignore[arg-type]
    return settings


def _xdg(variable: str, default: str, environment: Mapping[str, str]) -> Path:
    # A relative path in an XDG variable is invalid and to be ignored, says the specification.
    value = environment.get(variable, "")
    if value.startswith("/"):
        return Path(value)
    return Path(environment.get("HOME") or Path.home()) / default
