"""Directories and settings, and nothing else."""

from __future__ import annotations

import math
import os
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
    nbd_address -- the address of a hypervisor elsewhere at which its libvirt is to serve dirty
        bitmaps while one is read; None: no port is ever opened
    nbd_port -- the TCP port for that
    nbd_tls -- whether both sides prove who they are, and nobody else can read
    nbd_scratch -- a folder of that machine where libvirt may make files for as long
    nbd_certificates -- our folder with ca-cert.pem, client-cert.pem and client-key.pem; by default
        where libnbd looks
    lock_timeout -- seconds to wait for another process that works on the same domain, or on its
        points in a repository
    freeze_timeout -- seconds that file systems may take to freeze and may stay frozen
    keep_bitmaps -- how many bitmaps each disk keeps when a checkpoint is made; the older ones
        are archived.  0: all
    """

    store: Path | None = None
    socket_directory: Path | None = None
    nbd_address: str | None = None
    nbd_port: int = 10809
    nbd_tls: bool = True
    nbd_scratch: Path = Path("/var/lib/libvirt/qemu")
    nbd_certificates: Path | None = None
    lock_timeout: float = 30.0
    freeze_timeout: float = 10.0
    keep_bitmaps: int = 0


def store_directory(
    driver: Driver,
    embedded_root: Path | None,
    settings: Settings,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """The metadata directory where none is asked for.

    ``CKPTMGR_STORE``, else that of the settings, else ``/var/lib/ckptmgr`` for the system driver,
    ``ckptmgr`` in the XDG state directory for the session driver, ``ROOT/lib/ckptmgr`` for an
    embedded root.
    """
    chosen = environment.get("CKPTMGR_STORE")
    if chosen:
        return Path(chosen)
    if settings.store is not None:
        return settings.store
    if driver is Driver.EMBEDDED and embedded_root is not None:
        return embedded_root / "lib" / "ckptmgr"
    if driver is Driver.SESSION:
        return _xdg("XDG_STATE_HOME", ".local/state", environment) / "ckptmgr"
    return SYSTEM_STORE


def settings_file(
    driver: Driver, embedded_root: Path | None, environment: Mapping[str, str] = os.environ
) -> Path:
    """Where the settings of a driver are: beside libvirt's own configuration.

    ``CKPTMGR_CONFIG`` names another file.
    """
    chosen = environment.get("CKPTMGR_CONFIG")
    if chosen:
        return Path(chosen)
    if driver is Driver.EMBEDDED and embedded_root is not None:
        return embedded_root / "etc" / "ckptmgr.toml"
    if driver is Driver.SESSION:
        return _xdg("XDG_CONFIG_HOME", ".config", environment) / "ckptmgr.toml"
    return SYSTEM_SETTINGS


def read_settings(path: Path, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read a settings file; a missing one gives the defaults, unless ``CKPTMGR_CONFIG`` names it.

    Raises InvalidRequest for one that cannot be read, an unknown key or a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not environment.get("CKPTMGR_CONFIG"):
            return Settings()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest(f"the settings {path} cannot be read: {reason}") from error
    import tomllib  # most have no settings file

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
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
        if key in ("store", "socket_directory", "nbd_scratch", "nbd_certificates"):
            if not isinstance(value, str) or not Path(value).is_absolute():
                raise InvalidRequest(f"{path}: {key} must be an absolute path, not {value!r}")
            settings = replace(settings, **{key: Path(value)})  # type: ignore[arg-type]
        elif key == "keep_bitmaps":
            if type(value) is not int or value < 0:
                raise InvalidRequest(f"{path}: {key} must be a whole number, not {value!r}")
            settings = replace(settings, keep_bitmaps=value)
        elif key == "nbd_address":
            if not isinstance(value, str) or not value.isprintable() or value.split() != [value]:
                raise InvalidRequest(f"{path}: {key} must be a name or an address, not {value!r}")
            settings = replace(settings, nbd_address=value)
        elif key == "nbd_port":
            if type(value) is not int or not 0 < value < 65536:
                raise InvalidRequest(f"{path}: {key} must be a port, 1 to 65535, not {value!r}")
            settings = replace(settings, nbd_port=value)
        elif key == "nbd_tls":
            if not isinstance(value, bool):
                raise InvalidRequest(f"{path}: {key} must be true or false, not {value!r}")
            settings = replace(settings, nbd_tls=value)
        else:
            finite = isinstance(value, int | float) and 0 <= value < math.inf  # TOML has nan
            if isinstance(value, bool) or not isinstance(value, int | float) or not finite:
                raise InvalidRequest(f"{path}: {key} must be a number of seconds, not {value!r}")
            settings = replace(settings, **{key: float(value)})  # type: ignore[arg-type]
    return settings


def _xdg(variable: str, default: str, environment: Mapping[str, str]) -> Path:
    # A relative path in an XDG variable is invalid and to be ignored, says the specification.
    value = environment.get(variable, "")
    if value.startswith("/"):
        return Path(value)
    return Path(environment.get("HOME") or Path.home()) / default
