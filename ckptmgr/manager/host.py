"""A hypervisor with its domains, and a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import operation
from ..checkpoint import EngineName
from ..config import Settings, read_settings, settings_file, store_directory
from ..consistency.findings import Unfinished
from ..domain.adapter import DomainAdapter
from ..domain.connection import Connection
from ..domain.connection import connect as open_connection
from ..errors import InvalidRequest, NoDomain
from ..operation.session import Session
from ..store import Loaded, Store
from .domain import Domain

if TYPE_CHECKING:
    from ..backup.placement import Request as PlacementRequest
    from ..backup.restoring import Kept
    from ..backup.views import RestoreView
    from ..consistency.findings import Finding
    from ..plan.steps import Plan


def connect(
    uri: str | None = None,
    *,
    store: str | Path | None = None,
    engine: str = "auto",
    read_only: bool = False,
) -> Host:
    """Connect to the hypervisor at a libvirt `uri` of the QEMU driver.

    uri -- default: ``LIBVIRT_DEFAULT_URI``, then libvirt's own choice
    store -- the metadata directory; default: ``CKPTMGR_STORE``, then the driver's own
    engine -- auto, libvirt, monitor or offline

    Raises ConnectionFailed, Unsupported (another driver than QEMU's), InvalidRequest.
    """
    asked = _engine_name(engine)
    connection = open_connection(uri, read_only=read_only)
    try:
        place = (connection.driver, connection.embedded_root)
        settings = read_settings(settings_file(*place))
        directory = Path(store) if store else store_directory(*place, settings)
    except BaseException:
        connection.close()
        raise
    return Host(connection, Store(directory.absolute()), settings, asked)


def _engine_name(engine: str) -> EngineName | None:
    if engine == "auto":
        return None
    try:
        return EngineName(engine)
    except ValueError:
        known = ", ".join(["auto", *EngineName])
        raise InvalidRequest(f"there is no engine {engine!r}", hint=f"engines: {known}") from None


def _to_define(
    repository: str | Path,
    domain: str,
    point: str,
    folder: str | Path,
    disks: Sequence[str],
    onto: Mapping[str, str | Path] | None,
    flatten: bool,
) -> tuple[Kept, PlacementRequest]:
    from ..backup.catalogue import request
    from ..backup.repository import Repository
    from ..backup.restoring import find

    kept = find(Repository(Path(repository)), domain, point)
    return kept, request(point, folder, disks, onto, flatten)


def _settled(session: Session) -> Loaded:
    return operation.recovery.settled(session)


class Host:
    """A hypervisor and a store.  Close it, or use it as a context manager."""

    def __init__(
        self, connection: Connection, store: Store, settings: Settings, asked: EngineName | None
    ) -> None:
        self._connection = connection
        self._store = store
        self._settings = settings
        self._asked = asked

    @property
    def uri(self) -> str:
        """The connection's URI, as libvirt names it."""
        return self._connection.uri

    @property
    def store_directory(self) -> Path:
        """The metadata directory."""
        return self._store.directory

    def domain(self, name: str) -> Domain:
        """The domain with that name, UUID or id.

        Raises NoDomain; Unfinished if a restore has left something of a new domain of that name.
        """
        try:
            adapter = DomainAdapter.find(self._connection, name)
        except NoDomain as error:
            found = self.unfinished(name)
            if found is None:
                raise
            raise Unfinished(
                f"{error.message}: {found.message}",
                hint=f"`ckptmgr repair {name}` removes what was written for it; restore it again",
                finding=found,
            ) from error
        store = self._store.domain(adapter.uuid)
        return Domain(Session(adapter, store, self._settings, self._asked, _settled))

    def restore(
        self,
        repository: str | Path,
        domain: str,
        point: str,
        folder: str | Path,
        *,
        name: str,
        disks: Sequence[str] = (),
        onto: Mapping[str, str | Path] | None = None,
        flatten: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> RestoreView:
        """Define a new domain called `name` from a restore point.

        It has a new UUID and new MAC addresses; its images, and copies of its firmware's variables,
        kernel and initrd, are in `folder`; disks that are not restored are left out of it.  Its
        current checkpoint, called as the point, is the point: the next backup is an increment.

        domain, disks, onto, flatten, progress -- as for Catalogue.restore
        """
        from ..operation import defining  # libnbd, which few commands need

        kept, request = _to_define(repository, domain, point, folder, disks, onto, flatten)
        return defining.define(
            self._connection,
            self._store,
            self._settings,
            kept,
            request,
            name,
            progress or (lambda disk, done, total: None),
            _settled,
        )

    def plan_restore(
        self,
        repository: str | Path,
        domain: str,
        point: str,
        folder: str | Path,
        *,
        name: str,
        disks: Sequence[str] = (),
        onto: Mapping[str, str | Path] | None = None,
        flatten: bool = False,
    ) -> Plan:
        """What restore() would do."""
        from ..operation import defining

        kept, request = _to_define(repository, domain, point, folder, disks, onto, flatten)
        return defining.plan_define(self._connection, kept, request, name)

    def unfinished(self, name: str) -> Finding | None:
        """What an interrupted restore left of a new domain that libvirt never knew."""
        from ..operation import remnants

        return remnants.find(self._connection, self._store, name)

    def take_back(self, name: str) -> tuple[Finding, ...]:
        """Remove what an interrupted restore left of a new domain that libvirt never knew.

        Returns what was cured: nothing, if there was nothing.
        """
        from ..operation import remnants

        return remnants.take_back(self._connection, self._store, name)

    def plan_take_back(self, name: str) -> Plan | None:
        """What take_back() would do; None: nothing."""
        from ..operation import remnants

        return remnants.plan_take_back(self._connection, self._store, name)

    def domain_names(self) -> list[str]:
        """Names of all domains, running or not."""
        return self._connection.domains()

    def close(self) -> None:
        """Close the connection; the domains that came from it cannot be used any more."""
        self._connection.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
