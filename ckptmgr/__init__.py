"""Checkpoints of libvirt/QEMU virtual machines, with a history that survives.

    with ckptmgr.connect("qemu:///system") as host:
        domain = host.domain("web")
        domain.create("before-upgrade")
        print(domain.diff("before-upgrade").json())

Everything is loaded when it is first used: importing the package imports neither libvirt nor lxml.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .align import DiskRequest, parse_disk_spec
    from .backup.catalogue import Catalogue, repository
    from .backup.retention import Retention
    from .backup.views import (
        DamageView,
        PointDiskView,
        PointsView,
        PointView,
        PrunedPoint,
        PruneView,
        RestoredDisk,
        RestoreView,
        VerifyFinding,
        VerifyView,
    )
    from .checkpoint import EngineName, State
    from .consistency import Finding
    from .dirtymap import DirtyMap
    from .errors import (
        BitmapBroken,
        Busy,
        CheckpointExists,
        CkptmgrError,
        ConnectionFailed,
        GuestAgentFailed,
        InvalidDocument,
        InvalidRequest,
        NoCheckpoint,
        NodeUnknown,
        NoDomain,
        NoPoint,
        NoSnapshot,
        OperationFailed,
        PointExists,
        ReadOnlyConnection,
        RepositoryDamaged,
        RepositoryFailed,
        RestoreFailed,
        StoreDamaged,
        StoreFailed,
        Unsupported,
    )
    from .manager import BackupOptions, Domain, Host, connect
    from .plan.steps import Plan
    from .views import (
        CheckpointView,
        DiffView,
        DiskDiff,
        DiskView,
        DomainView,
        ListView,
        PlaceView,
        SnapshotView,
    )

__all__ = [
    "BackupOptions",
    "BitmapBroken",
    "Busy",
    "Catalogue",
    "CheckpointExists",
    "CheckpointView",
    "CkptmgrError",
    "ConnectionFailed",
    "DamageView",
    "DiffView",
    "DirtyMap",
    "DiskDiff",
    "DiskRequest",
    "DiskView",
    "Domain",
    "DomainView",
    "EngineName",
    "Finding",
    "GuestAgentFailed",
    "Host",
    "InvalidDocument",
    "InvalidRequest",
    "ListView",
    "NoCheckpoint",
    "NoDomain",
    "NoPoint",
    "NoSnapshot",
    "NodeUnknown",
    "OperationFailed",
    "PlaceView",
    "Plan",
    "PointDiskView",
    "PointExists",
    "PointView",
    "PointsView",
    "PruneView",
    "PrunedPoint",
    "ReadOnlyConnection",
    "RepositoryDamaged",
    "RepositoryFailed",
    "RestoreFailed",
    "RestoreView",
    "RestoredDisk",
    "Retention",
    "SnapshotView",
    "State",
    "StoreDamaged",
    "StoreFailed",
    "Unsupported",
    "VerifyFinding",
    "VerifyView",
    "__version__",
    "connect",
    "parse_disk_spec",
    "repository",
]

_ELSEWHERE = {
    ".align": ("DiskRequest", "parse_disk_spec"),
    ".backup.catalogue": ("Catalogue", "repository"),
    ".backup.retention": ("Retention",),
    ".backup.views": (
        "DamageView",
        "PointDiskView",
        "PointView",
        "PointsView",
        "RestoreView",
        "RestoredDisk",
        "PruneView",
        "PrunedPoint",
        "VerifyFinding",
        "VerifyView",
    ),
    ".checkpoint": ("EngineName", "State"),
    ".consistency": ("Finding",),
    ".dirtymap": ("DirtyMap",),
    ".manager": ("BackupOptions", "Domain", "Host", "connect"),
    ".plan.steps": ("Plan",),
    ".views": (
        "CheckpointView",
        "DiffView",
        "DiskDiff",
        "DiskView",
        "DomainView",
        "ListView",
        "PlaceView",
        "SnapshotView",
    ),
}
_MODULES = {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, ".errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
