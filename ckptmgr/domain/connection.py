"""Connections to libvirt's QEMU driver."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from ..config import Driver
from ..errors import CkptmgrError, InvalidRequest, NoDomain, Unsupported
from .binding import libvirt
from .failure import translate
from .support import Machine, has_backup_feature, parse_backup_feature

_NO_DOMAIN = 42
_NO_SUPPORT = 3

# A peer that says nothing for this long (seconds, times) is gone.
_KEEPALIVE = (5, 6)


@dataclass(frozen=True)
class Location:
    """What a libvirt URI says about where the hypervisor is.

    driver -- which of the QEMU drivers
    root -- of an embedded driver
    local -- the hypervisor's file system is this machine's
    socket -- path of the daemon's socket, if the URI names one: a daemon that may have
        directories of its own
    """

    driver: Driver
    root: Path | None = None
    local: bool = True
    socket: str | None = None


def parse_uri(uri: str) -> Location:
    """Read a URI of the QEMU driver.

    ``qemu:///system``, ``qemu:///session``, ``qemu:///embed?root=DIR``,
    ``qemu+unix:///system?socket=PATH``, ``qemu+ssh://host/system``, ...

    Raises Unsupported for other drivers, InvalidRequest for a URI that cannot work.
    """
    try:
        parts = urlsplit(uri)
        host = parts.netloc
    except ValueError as error:
        raise InvalidRequest(f"{uri!r} is not a URI: {error}") from None
    scheme, _, transport = parts.scheme.partition("+")
    if scheme != "qemu":
        raise Unsupported(
            f"{uri!r} is not a URI of libvirt's QEMU driver",
            hint="use qemu:///system, qemu:///session or qemu:///embed?root=DIR",
        )
    parameters = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    path = unquote(parts.path)
    if path == "/embed":
        root = parameters.get("root")
        if root is None or not Path(root).is_absolute():
            raise InvalidRequest(
                f"{uri!r} needs the absolute path of a directory",
                hint="write it as qemu:///embed?root=/absolute/path",
            )
        return Location(Driver.EMBEDDED, root=Path(root))
    driver = Driver.SESSION if path == "/session" else Driver.SYSTEM
    return Location(
        driver,
        local=not host and transport in ("", "unix"),
        socket=parameters.get("socket"),
    )


_loop_lock = threading.Lock()
_loop: threading.Thread | None = None


def start_event_loop() -> None:
    """Run libvirt's default event loop in a daemon thread; once per process.

    The embedded driver needs one before it is opened (it waits for QEMU's monitor in it), a
    connection to a daemon for its keep-alives.
    """
    global _loop
    with _loop_lock:
        if _loop is not None:
            return
        with translate("starting libvirt's event loop"):
            libvirt.virEventRegisterDefaultImpl()
        _loop = threading.Thread(target=_run_loop, name="libvirt-events", daemon=True)
        _loop.start()


def _run_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def connect(uri: str | None = None, *, read_only: bool = False) -> Connection:
    """Open a connection; without `uri`, ``LIBVIRT_DEFAULT_URI`` or what libvirt itself takes.

    Raises ConnectionFailed, Unsupported (not the QEMU driver), InvalidRequest (a bad URI).
    """
    chosen = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or None
    if chosen is not None and ("\0" in chosen or not _encodable(chosen)):
        raise InvalidRequest(f"{chosen!r} is not a URI")
    if chosen is not None and ":" in chosen:  # else an alias of libvirt.conf
        parse_uri(chosen)
    start_event_loop()
    handle = _open(chosen, read_only)
    try:
        return _opened(handle, chosen, read_only)
    except CkptmgrError:
        if all(handle is not kept for kept in _embedded.values()):
            handle.close()
        raise


_embedded: dict[tuple[str, bool], Any] = {}
"""Open connections to the embedded driver, by URI and whether they only allow reading."""


def _open(uri: str | None, read_only: bool) -> Any:
    """A virConnect.

    Those of the embedded driver stay open until the process ends, and serve every connect:
    libvirt 9.0 registers the driver anew at each open, and refuses after some twenty of them
    ("Too many drivers, cannot register QEMU").
    """
    with _loop_lock, translate(f"connecting to {uri or 'libvirt'}"):
        if uri is None or ":" not in uri or parse_uri(uri).driver is not Driver.EMBEDDED:
            return libvirt.openReadOnly(uri) if read_only else libvirt.open(uri)
        key = (uri, read_only)
        if key not in _embedded:
            _embedded[key] = libvirt.openReadOnly(uri) if read_only else libvirt.open(uri)
        return _embedded[key]


def _opened(handle: Any, chosen: str | None, read_only: bool) -> Connection:
    with translate("asking libvirt for its driver"):
        kind, canonical = handle.getType(), handle.getURI()
    if kind != "QEMU":
        raise Unsupported(
            f"{canonical!r} is libvirt's {kind} driver; checkpoints need QEMU",
            hint="use qemu:///system, qemu:///session or qemu:///embed?root=DIR",
        )
    # libvirt may report the daemon's own URI; what the user wrote says how it was reached.
    location = parse_uri(chosen if chosen is not None and ":" in chosen else canonical)
    if location.driver is not Driver.EMBEDDED:
        with translate("setting up keep-alives"):
            try:
                handle.setKeepAlive(*_KEEPALIVE)
            except libvirt.libvirtError as error:
                if error.get_error_code() != _NO_SUPPORT:
                    raise
    return Connection(handle, canonical, location, read_only)


class Connection:
    """An open connection.

    handle -- the virConnect
    uri -- as libvirt spells it
    location -- what the URI says about where the hypervisor is
    read_only -- libvirt refuses whatever changes something
    """

    def __init__(self, handle: Any, uri: str, location: Location, read_only: bool) -> None:
        self.handle = handle
        self.uri = uri
        self.location = location
        self.read_only = read_only
        self._backup_features: dict[Machine, bool] = {}

    @property
    def driver(self) -> Driver:
        """Which of the QEMU drivers it talks to."""
        return self.location.driver

    @property
    def embedded_root(self) -> Path | None:
        """The root directory of an embedded driver."""
        return self.location.root

    @property
    def local(self) -> bool:
        """Whether the hypervisor's file system is this machine's."""
        return self.location.local

    def lookup(self, key: str) -> Any:
        """libvirt's handle of the domain with this id (if it runs), UUID or name; in this order,
        as in virsh.  Raises NoDomain.
        """
        if not key or "\0" in key or not _encodable(key):
            raise NoDomain(f"no domain can be called {key!r}")
        ways: list[Callable[[], Any]] = []
        if re.fullmatch("[0-9]{1,9}", key):
            ways.append(lambda: self.handle.lookupByID(int(key)))
        if re.fullmatch(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}", key):
            ways.append(lambda: self.handle.lookupByUUIDString(key))
        ways.append(lambda: self.handle.lookupByName(key))
        for way in ways:
            with translate("looking the domain up", key):
                try:
                    return way()
                except libvirt.libvirtError as error:
                    if error.get_error_code() != _NO_DOMAIN:
                        raise
        raise NoDomain(
            f"there is no domain {key!r} on {self.uri}",
            hint=f"see `virsh -c '{self.uri}' list --all`",
        )

    def backup_feature(self, machine: Machine) -> bool:
        """Whether libvirt's domain capabilities have ``<backup supported='yes'/>``.

        Asked once for each kind of machine: it is a property of libvirt and of the emulator.  Who
        may only read is not told the capabilities, and goes by the versions.

        Raises libvirtError.
        """
        if self.read_only:
            return has_backup_feature(self.handle.getLibVersion(), self.handle.getVersion())
        if machine not in self._backup_features:
            capabilities = self.handle.getDomainCapabilities(
                machine.emulator, machine.arch, machine.machine, machine.virt_type
            )
            self._backup_features[machine] = parse_backup_feature(capabilities)
        return self._backup_features[machine]

    def domains(self) -> list[str]:
        """The names of all domains, sorted."""
        with translate("listing the domains"):
            return sorted(domain.name() for domain in self.handle.listAllDomains(0))

    def close(self) -> None:
        """Close the connection; domains of an embedded driver go on running.

        A connection that is lost already is closed, too; one to an embedded driver stays open
        for the next connect of this process.
        """
        if self.driver is Driver.EMBEDDED:
            return
        try:
            self.handle.close()
        except libvirt.libvirtError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of an argument that are not UTF-8
        return False
    return True
