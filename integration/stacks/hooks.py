"""Our hook in a stack's libvirt.

A release has no Python that ckptmgr runs on.  So libvirt calls the script inside, and the script a
Python that changes over to this machine's programs (``/machine``, see ``init.py``), where the
stack's images, its libvirt's folders and the store have the paths that they have inside.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ckptmgr.hook.installation import install, setting, uninstall
from ckptmgr.hook.script import Setting

PACKAGE = Path(__file__).resolve().parent.parent.parent


def programs() -> Sequence[str]:
    """The folders that this machine's Python, QEMU's tools and ckptmgr are in."""
    folders = sorted({Path("/usr"), Path(sys.base_prefix), Path(sys.prefix), PACKAGE})
    below = {each for each in folders if any(other in each.parents for other in folders)}
    return [str(each) for each in folders if each not in below]


class Hooks:
    """A stack's folder of hooks.

    path -- outside
    """

    def __init__(self, libvirt: Path, store: Path) -> None:
        """`libvirt`: the folder that is ``/etc/libvirt`` inside."""
        self.path = libvirt / "hooks"
        self.path.mkdir(exist_ok=True)
        python = libvirt / "python"
        command = shlex.join(["chroot", "/machine", sys.executable])
        python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        python.chmod(0o755)
        self.setting: Setting = setting(store, Path("/etc/libvirt/python"))

    def install(self) -> Path:
        """As ``ckptmgr hook install`` does; returns the script's path inside."""
        path = install(self.path, self.setting)
        return Path("/etc/libvirt/hooks") / path.relative_to(self.path)

    def uninstall(self) -> None:
        """As ``ckptmgr hook uninstall`` does."""
        uninstall(self.path)
