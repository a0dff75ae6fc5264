"""The steps of an operation, counted, and somebody killed at one of them.

A boundary is the instant before a system call of the store or a repository, before something is
written to a volume or gets its name, before an engine's step, before the marker is set, before a
domain is paused, resumed, reverted or defined, and the end of the operation: what is true after one
of these calls is what is true before the next, for nothing else changes anything.  libvirt's daemon
and QEMU go on with what they were asked when the asking process dies, so there is one more boundary
in the middle of each of these but the file system's.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptmgr.backup import qcow2, temporaries, volume
from ckptmgr.checkpoint import EngineName
from ckptmgr.domain import snapshots
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.connection import Connection
from ckptmgr.engine import base, libvirt, monitor, offline
from ckptmgr.engine.base import Outcome
from ckptmgr.operation import pausing
from ckptmgr.plan.steps import Step
from ckptmgr.store import files

END = "the end"

STORE_CALLS = (
    "_create",
    "_write",
    "_fsync",
    "_rename",
    "_unlink",
    "_rmdir",
    "_mkdir",
    "_fsync_folder",
)

IMAGE_CALLS: tuple[tuple[ModuleType, str], ...] = (
    (qcow2, "_write"),
    (volume, "_write"),
    (volume, "clear"),
    (temporaries, "_link"),
)

SNAPSHOT_CALLS: tuple[tuple[ModuleType, str], ...] = (
    (snapshots, "revert"),
    (pausing, "pause"),
    (pausing, "resume"),
)

IN_FLIGHT = 0.002
"""Seconds from the beginning of a step to its middle: less than any of them takes."""


class Victim(StrEnum):
    """Who is killed; `HOST` is QEMU and this process at one instant."""

    PROCESS = "process"
    QEMU = "qemu"
    LIBVIRTD = "libvirtd"
    HOST = "host"


class Boundaries:
    """Counts boundaries of this process and strikes at number `point`, from 1, or at the end.

    pids -- of the victims that are not this process
    steps_only -- the store's system calls do not count
    report -- told the boundary's name just before the strike
    """

    def __init__(
        self,
        victim: Victim,
        point: int,
        pids: Mapping[str, int],
        report: Callable[[str], None],
        *,
        steps_only: bool,
    ) -> None:
        self._victim = victim
        self._left = point
        self._pids = pids
        self._report = report
        self._steps_only = steps_only

    def install(self) -> None:
        """From now on every boundary of this process counts."""
        if not self._steps_only:
            for name in STORE_CALLS:
                setattr(files, name, self._store_call(name, getattr(files, name)))
            for module, name in IMAGE_CALLS:
                setattr(module, name, self._store_call(name, vars(module)[name]))
        for module in (libvirt, monitor, offline):
            setattr(module, "run_steps", self._run_steps)  # noqa: B010 -- not for mypy to see
        set_marker = DomainAdapter.set_marker

        def marked(adapter: DomainAdapter, marker: Any) -> None:
            self._around("the marker", lambda: set_marker(adapter, marker))

        setattr(DomainAdapter, "set_marker", marked)  # noqa: B010
        define = DomainAdapter.define

        def defined(connection: Connection, definition: str) -> DomainAdapter:
            done: list[DomainAdapter] = []
            self._around("define", lambda: done.append(define(connection, definition)))
            return done[0]

        setattr(DomainAdapter, "define", defined)  # noqa: B010
        for owner, name in SNAPSHOT_CALLS:
            setattr(owner, name, self._call(name, getattr(owner, name)))

    def _call(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any, **options: Any) -> None:
            self._around(name, lambda: call(*arguments, **options))

        return counted

    def end(self) -> None:
        """The operation is over: the last boundary, however many there were to be."""
        if self._left > 0:
            self._left = 1
            self._at(END)

    def _store_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(target: int | Path, *arguments: Any) -> Any:
            what = "" if isinstance(target, int) else f" {target.name}"
            self._at(f"before {name}{what}")
            return call(target, *arguments)

        return counted

    def _run_steps(
        self, engine: EngineName, steps: Sequence[Step], perform: Callable[[Step, Outcome], None]
    ) -> Outcome:
        def counted(step: Step, outcome: Outcome) -> None:
            self._around(f"{engine} {type(step).__name__}", lambda: perform(step, outcome))

        return base.run_steps(engine, steps, counted)

    def _around(self, name: str, call: Callable[[], None]) -> None:
        self._at(f"before {name}")
        self._left -= 1
        if self._left != 0:
            call()
            return
        self._report(f"in the middle of {name}")
        striker = threading.Thread(target=self._strike_soon)
        striker.start()
        try:
            call()
        finally:
            striker.join()

    def _strike_soon(self) -> None:
        time.sleep(IN_FLIGHT)
        self._strike()

    def _at(self, name: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._report(name)
            self._strike()

    def _strike(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
        if self._victim in (Victim.PROCESS, Victim.HOST):
            os.kill(os.getpid(), signal.SIGKILL)
