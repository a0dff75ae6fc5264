"""The library's face: a host, its domains, and what can be done with their checkpoints.

    with ckptmgr.connect("qemu:///system") as host:
        domain = host.domain("web")
        before = domain.create(description="before the update")
        ...
        for disk in domain.diff(before.name).disks:
            print(disk.name, disk.known, disk.dirty_bytes)

Everything raises a subclass of ``ckptmgr.CkptmgrError``, one for each error code of
``docs/cli.md``.
"""

from .domain import Domain
from .host import Host, connect
from .options import BackupOptions

__all__ = ["BackupOptions", "Domain", "Host", "connect"]
