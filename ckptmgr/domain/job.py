"""The backup job of a running domain, as far as it concerns us."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import OperationFailed
from .adapter import DomainAdapter
from .binding import libvirt
from .failure import translate

# virErrorNumber: NO_DOMAIN_BACKUP, and OPERATION_INVALID "domain is not running".
_NO_JOB = (104, 55)


def backup_job(adapter: DomainAdapter) -> str | None:
    """The document of the backup job that is running, None if there is no such job."""
    try:
        with translate("looking for a backup job", adapter.name):
            document: str = adapter.handle.backupGetXMLDesc(0)
    except OperationFailed as error:
        cause = error.__cause__
        if isinstance(cause, libvirt.libvirtError) and cause.get_error_code() in _NO_JOB:
            return None
        raise
    return document


def block_jobs(adapter: DomainAdapter, targets: Iterable[str]) -> tuple[str, ...]:
    """The disks, of `targets`, of a running domain that a block job works on."""
    with translate("asking for block jobs", adapter.name):
        return tuple(target for target in targets if adapter.handle.blockJobInfo(target, 0))
