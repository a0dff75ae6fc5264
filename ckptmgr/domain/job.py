"""The backup job of a running domain, as far as it concerns us."""

from __future__ import annotations

from ..errors import OperationFailed
from ..xml import parse
from .adapter import DomainAdapter
from .binding import libvirt
from .failure import translate

# virErrorNumber: NO_DOMAIN_BACKUP, and OPERATION_INVALID "domain is not running".
_NO_JOB = (104, 55)


def backup_socket(adapter: DomainAdapter) -> str | None:
    """The NBD socket of the pull backup job that is running, None if there is no such job."""
    try:
        with translate("looking for a backup job", adapter.name):
            document = adapter.handle.backupGetXMLDesc(0)
    except OperationFailed as error:
        cause = error.__cause__
        if isinstance(cause, libvirt.libvirtError) and cause.get_error_code() in _NO_JOB:
            return None
        raise
    server = parse(document, what="the backup job").find("server")
    return None if server is None else server.get("socket")
