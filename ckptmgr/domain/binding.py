"""libvirt's Python binding, loaded so that it does not write to standard error.

Import libvirt from here: libvirt reads its logging environment once, when it is loaded.
"""

from __future__ import annotations

import os

# An embedded driver logs to this process's standard error, by default from "warning" on (taints,
# the security driver).  Setting an output instead would make libvirt log every error as well.
_QUIET = "LIBVIRT_DEBUG"
_unset = not any(
    os.environ.get(name) for name in (_QUIET, "LIBVIRT_LOG_OUTPUTS", "LIBVIRT_LOG_FILTERS")
)
if _unset:
    os.environ[_QUIET] = "error"
try:
    import libvirt
    import libvirt_qemu
finally:
    if _unset:
        del os.environ[_QUIET]


def _swallow(_context: object, _error: object) -> None:
    """libvirt's default handler prints each error; ours all become exceptions."""


libvirt.registerErrorHandler(_swallow, None)

__all__ = ["libvirt", "libvirt_qemu"]
