"""Which tests of a release only repeat what is shown elsewhere.

A test that is run on every release is a repeat

- where libvirt and QEMU are those of this machine: the embedded libvirt and the daemon have had it;
- with another engine than ckptmgr would choose there.  That of `offline` is this machine's qemu-img
  on every release, and `libvirt` is refused to each test alike where libvirt has no checkpoints.

Of the repeats in a cell of the table those are run that are marked ``each_release``; where none is,
all are.  So no cell is lost.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

import libvirt

from ckptmgr.checkpoint import EngineName

from .build import RELEASES


@dataclass(frozen=True)
class Case:
    """A test with its parameters, and the cell of the table that it belongs to.

    marked -- with ``each_release``
    """

    scenario: str
    engine: str
    stack: str
    marked: bool


def repeats(cases: Iterable[Case], own: str | None) -> list[bool]:
    """Of each case: whether it can be left out.

    own -- the release whose libvirt and QEMU are this machine's, if there is one
    """
    cases = list(cases)
    shown = {(case.scenario, case.engine, case.stack) for case in cases if case.marked}
    return [
        not case.marked
        and (case.scenario, case.engine, case.stack) in shown
        and _repeated(case, own)
        for case in cases
    ]


def _repeated(case: Case, own: str | None) -> bool:
    release = RELEASES.get(case.stack)
    if release is None:
        return False
    other = case.engine in [*EngineName] and case.engine != release.engine
    return case.stack == own or other


def own_release() -> str | None:
    """The release whose libvirt and QEMU this machine has, too."""
    try:
        said = subprocess.run(
            ["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"version (\d+\.\d+)", said)
    number = libvirt.getVersion()
    ours = f"{number // 1_000_000}.{number // 1000 % 1000}", found and found[1]
    releases = RELEASES.items()
    return next((name for name, each in releases if (each.libvirt, each.qemu) == ours), None)
