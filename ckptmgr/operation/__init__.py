"""The use cases, one module each; ``manager`` is their public face.

Each is loaded when it is first used: a command needs one of them, and what that one imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        adoption,
        archive,
        backup,
        creation,
        deletion,
        difference,
        point,
        preparation,
        recovery,
        redefinition,
        repair,
        reversion,
        snapshotting,
    )

__all__ = [
    "adoption",
    "archive",
    "backup",
    "creation",
    "deletion",
    "difference",
    "point",
    "preparation",
    "recovery",
    "redefinition",
    "repair",
    "reversion",
    "snapshotting",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
