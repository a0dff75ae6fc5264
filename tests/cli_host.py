"""A hypervisor of plain objects for the command line: it answers, and notes what it was asked."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap64

from ckptmgr.backup.repository import Repository
from ckptmgr.backup.views import PointView, RestoredDisk, RestoreView, point_view
from ckptmgr.checkpoint import EngineName, State
from ckptmgr.cli.session import Session
from ckptmgr.consistency import Finding, MarkBroken, Unfinished
from ckptmgr.dirtymap import DirtyMap
from ckptmgr.errors import CkptmgrError, NoCheckpoint, NoDomain
from ckptmgr.plan.steps import CheckpointCreate, Plan
from ckptmgr.views import (
    CheckpointView,
    DiffView,
    DiskDiff,
    DiskView,
    DomainView,
    ListView,
    PlaceView,
    SnapshotView,
)

from .repositories import UUID, manifest

KIB = 1024
DOMAIN = DomainView("web", "6695eb01-f6a4-8304-79aa-97f2502e193f")
NOON = 1795348800  # 2026-11-22T12:00:00Z


def disk(name: str = "vda", bitmap: str | None = "c0", **known: Any) -> DiskView:
    values: dict[str, Any] = {
        "granularity": 64 * KIB,
        "node": "libvirt-1-format",
        "persistent": True,
        "state": State.RECORDING,
    }
    if bitmap is None:
        values = {"granularity": None, "node": None, "persistent": True, "state": State.NONE}
    return DiskView(name, bitmap, **(values | known))


def checkpoint(name: str, parent: str | None = None, **known: Any) -> CheckpointView:
    values: dict[str, Any] = {
        "children": (),
        "domain": DOMAIN,
        "current": False,
        "created": NOON,
        "description": None,
        "engine": EngineName.LIBVIRT,
        "disks": (disk(bitmap=name), disk("vdb", None, reason="raw images cannot keep bitmaps")),
    }
    return CheckpointView(name=name, parent=parent, **(values | known))


def forest(parents: dict[str, str | None], current: str | None = None) -> list[CheckpointView]:
    """Checkpoints with these parents, in this order."""
    return [
        checkpoint(
            name,
            parent,
            current=name == current,
            children=tuple(child for child, of in parents.items() if of == name),
        )
        for name, parent in parents.items()
    ]


FORK = forest({"c0": None, "c1": "c0", "c2": "c1", "c3": "c2", "c4": "c1"}, current="c4")

DIFF = DiffView(
    DOMAIN,
    "c0",
    None,
    (
        DiskDiff("vda", 1024 * KIB, 64 * KIB, DirtyMap(64 * KIB, 1024 * KIB, BitMap64([0, 1, 9]))),
        DiskDiff("vdb", 512 * KIB, None, None, "the bitmap c0 is missing"),
    ),
)
PLAN = Plan(EngineName.LIBVIRT, (CheckpointCreate("<x/>"),), notes=("vdb is left out: raw",))

FINDINGS = (
    Finding(
        "missing-bitmap",
        "the bitmap of c4 on vda is missing",
        "that is recorded",
        disk="vda",
        checkpoint="c4",
        action=MarkBroken("c4", "vda", "its bitmap is missing", remove=False),
    ),
    Finding("disk-resized", "vda \x1b[31m has grown", "none is needed", "vda", harmless=True),
)


SNAPSHOT = SnapshotView(
    name="before-update",
    domain=DOMAIN,
    parent=None,
    checkpoint="c1",
    created=NOON,
    current=True,
    state="running",
    memory="internal",
    disks=(("vda", "internal"), ("vdb", "no")),
)


@dataclass
class Domain:
    """Stands where ckptmgr.manager.Domain does; `asked` has each call with its arguments."""

    existing: Sequence[CheckpointView] = ()
    view: DomainView = DOMAIN
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    fails: Exception | None = None
    signal: int | None = None

    def _note(self, name: str, /, *arguments: Any, **options: Any) -> None:
        self.asked.append((name, arguments, options))
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)
        if self.fails is not None:
            raise self.fails

    def create(self, name: str | None = None, **options: Any) -> CheckpointView:
        self._note("create", name, **options)
        logging.getLogger("ckptmgr.manager").warning("vdb is left out: raw \x1b[31m")
        return checkpoint(name or str(NOON))

    def checkpoints(self, **options: Any) -> ListView:
        self._note("checkpoints", **options)
        current = next((each.name for each in self.existing if each.current), None)
        shown = tuple(self.existing)
        if options.get("start"):
            shown = tuple(each for each in shown if each.name in ("c2", "c3"))
        if options.get("snapshots"):
            return ListView(DOMAIN, current, shown, (SNAPSHOT,), PlaceView(current, "running"))
        return ListView(DOMAIN, current, shown)

    def checkpoint(self, name: str, *, size: bool = False) -> CheckpointView:
        self._note("checkpoint", name, size=size)
        for each in self.existing:
            if each.name == name:
                return each
        raise NoCheckpoint(
            f"domain 'web': there is no checkpoint {name!r}", hint="`ckptmgr list` lists them"
        )

    def document(self, name: str, *, size: bool = False) -> str:
        self._note("document", name, size=size)
        return f"<domaincheckpoint>\n  <name>{name}</name>\n</domaincheckpoint>\n"

    def current(self) -> CheckpointView | None:
        self._note("current")
        return next((each for each in self.existing if each.current), None)

    def has_current(self) -> bool:
        self._note("has_current")
        return any(each.current for each in self.existing)

    def parent(self, name: str) -> CheckpointView:
        parent = self.checkpoint(name).parent
        if parent is None:
            raise NoCheckpoint(f"checkpoint {name!r} has no parent")
        return self.checkpoint(parent)

    def delete(self, name: str, **options: Any) -> tuple[str, ...]:
        self._note("delete", name, **options)
        return (name, "c3")

    def redefine(self, document: str, **options: Any) -> CheckpointView:
        self._note("redefine", document, **options)
        return checkpoint("c9")

    def adopt(self) -> tuple[CheckpointView, ...]:
        self._note("adopt")
        return (checkpoint("v1"), checkpoint("v2", "v1"))

    def diff(self, start: str, end: str | None = None) -> DiffView:
        self._note("diff", start, end)
        return DIFF

    def check(self) -> tuple[Finding, ...]:
        self._note("check")
        return () if self.asked[0][0] == "repair" else FINDINGS

    def repair(self, **options: Any) -> tuple[Finding, ...]:
        self._note("repair", **options)
        return FINDINGS[:1]

    def archive(self, keep: int) -> dict[str, tuple[str, ...]]:
        self._note("archive", keep)
        return {"c1": ("vda", "vdb"), "c2": ("vda",)}

    def backup(self, repository: Path, name: str | None = None, **options: Any) -> PointView:
        options.pop("progress")
        self._note("backup", repository, name, **options)
        lineage = Repository(repository).lineage(UUID)
        made = manifest(name or "1795348800")
        folder = str(lineage.path / made.name)
        return point_view(lineage.key, folder, made, parent=None, broken=None)

    def plan_backup(self, repository: Path, name: str | None = None, **options: Any) -> Plan:
        self._note("plan_backup", repository, name, **options)
        return PLAN

    def create_snapshot(self, name: str | None = None, **options: Any) -> SnapshotView:
        self._note("create_snapshot", name, **options)
        return SNAPSHOT

    def revert_snapshot(self, name: str, **options: Any) -> CheckpointView:
        self._note("revert_snapshot", name, **options)
        return checkpoint("c9", "c1")

    def delete_snapshot(self, name: str, **options: Any) -> tuple[str, ...]:
        self._note("delete_snapshot", name, **options)
        return (name,)

    def snapshots(self) -> tuple[SnapshotView, ...]:
        self._note("snapshots")
        return (SNAPSHOT,)

    def plan_create_snapshot(self, name: str | None = None, **options: Any) -> Plan:
        self._note("plan_create_snapshot", name, **options)
        return PLAN

    def plan_revert_snapshot(self, name: str, **options: Any) -> Plan:
        self._note("plan_revert_snapshot", name, **options)
        return PLAN

    def plan_delete_snapshot(self, name: str, **options: Any) -> Plan:
        self._note("plan_delete_snapshot", name, **options)
        return PLAN

    def plan_repair(self, **options: Any) -> Plan:
        self._note("plan_repair", **options)
        return PLAN

    def plan_archive(self, keep: int) -> Plan:
        self._note("plan_archive", keep)
        return PLAN

    def plan_create(self, name: str | None = None, **options: Any) -> Plan:
        self._note("plan_create", name, **options)
        return PLAN

    def plan_delete(self, name: str, **options: Any) -> Plan:
        self._note("plan_delete", name, **options)
        return PLAN

    def plan_redefine(self, document: str, **options: Any) -> Plan:
        self._note("plan_redefine", document, **options)
        return PLAN

    def restore(self, *arguments: Any, **options: Any) -> RestoreView:
        self._note("restore", *arguments, **options)
        return RESTORED

    def plan_restore(self, *arguments: Any, **options: Any) -> Plan:
        self._note("plan_restore", *arguments, **options)
        return PLAN

    def plan_adopt(self) -> Plan:
        self._note("plan_adopt")
        return PLAN


RESTORED = RestoreView(
    "monday", DOMAIN, (RestoredDisk("vda", "/img/vda.qcow2", "qcow2", 64 * KIB, 1024 * KIB),)
)


UNFINISHED = Finding("intent", "a restore to web2 was interrupted", "it is removed")
"""Of the domain web2, which there is not."""


@dataclass
class Host:
    """Stands where ckptmgr.manager.Host does; knows one domain."""

    only: Domain
    sessions: list[Session] = field(default_factory=list)
    closed: int = 0
    fails: CkptmgrError | None = None

    def domain(self, name: str) -> Domain:
        if name == "web2":
            raise Unfinished("there is no domain 'web2'", hint="repair it", finding=UNFINISHED)
        if name != "web":
            raise NoDomain(f"there is no domain {name!r}", hint="virsh list --all")
        return self.only

    def restore(self, *arguments: Any, **options: Any) -> RestoreView:
        self.only._note("define", *arguments, **options)
        return RESTORED

    def plan_restore(self, *arguments: Any, **options: Any) -> Plan:
        self.only._note("plan_define", *arguments, **options)
        return PLAN

    def take_back(self, name: str) -> tuple[Finding, ...]:
        self.only._note("take_back", name)
        return (UNFINISHED,) if name == "web2" else ()

    def plan_take_back(self, name: str) -> Plan | None:
        return PLAN if name == "web2" else None

    def domain_names(self) -> list[str]:
        return ["web", "my vm", "a,b", "$(reboot)"]


def answering(host: Host) -> Callable[[Session], AbstractContextManager[Host]]:
    """What stands where Session.host does."""

    @contextmanager
    def connect(session: Session) -> Iterator[Host]:
        host.sessions.append(session)
        if host.fails is not None:
            raise host.fails
        try:
            yield host
        finally:
            host.closed += 1

    return connect


@pytest.fixture(name="host")
def host_fixture(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The hypervisor that every command of this test talks to."""
    host = Host(Domain(FORK))
    monkeypatch.setattr(Session, "host", answering(host))
    return host


if __name__ == "__main__":  # stands where the ckptmgr of a shell does
    from ckptmgr.cli import main

    Session.host = answering(Host(Domain(FORK)))  # type: ignore[method-assign, assignment]
    sys.exit(main())
