"""The operations that are killed, and what each needs before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import libvirt

from ckptmgr.checkpoint import EngineName

from .boundaries import Victim
from .scene import Scene
from .warm import Task


@dataclass(frozen=True)
class Scenario:
    """An operation to be killed.

    prepare -- make what it needs; called before each kill
    after -- what check has to say after the kill and one more create, and what is done then
    steps_only -- the store's system calls do not count
    unfinished -- codes of what it cures, which check may find still if QEMU died before that
    """

    name: str
    engine: EngineName
    prepare: Callable[[Scene], Task]
    after: Callable[[Scene], None] = Scene.require_clean
    steps_only: bool = False
    unfinished: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.name}, {self.engine}"


def _first(scene: Scene) -> Task:
    scene.fresh()
    return scene.task("create", name=scene.name())


def _later(scene: Scene) -> Task:
    scene.grow(2)
    return scene.task("create", name=scene.name())


def _delete_middle(scene: Scene) -> Task:
    scene.grow(3)
    return scene.task("delete", name=scene.line[-2])


def _delete_current(scene: Scene) -> Task:
    scene.grow(2)
    return scene.task("delete", name=scene.line[-1])


def _delete_children(scene: Scene) -> Task:
    scene.grow(3)
    return scene.task("delete", name=scene.line[-2], children=True)


def _archive(scene: Scene) -> Task:
    scene.grow(2)
    scene.write()
    scene.create()
    return scene.task("archive", keep=1)


def _foreign(scene: Scene) -> str:
    """A checkpoint that libvirt has and ckptmgr did not make."""
    name = scene.name()
    disks = "".join(f"<disk name='{disk.target}'/>" for disk in scene.machine.disks)
    document = f"<domaincheckpoint><name>{name}</name><disks>{disks}</disks></domaincheckpoint>"
    scene.machine.domain.checkpointCreateXML(document)
    scene.made(name)
    scene.lost.add(name)
    return name


def _adopt(scene: Scene) -> Task:
    scene.grow(2)
    for _ in range(2):
        scene.write()
        _foreign(scene)
    return scene.task("adopt")


def _adopted(scene: Scene) -> None:
    listed = {view.name for view in scene.domain.checkpoints().checkpoints}
    left = {each.getName() for each in scene.machine.domain.listAllCheckpoints()} - listed
    found = [(finding.code, finding.checkpoint) for finding in scene.findings()]
    assert sorted(found) == sorted(("libvirt-only", name) for name in left)
    assert {view.name for view in scene.domain.adopt()} == left
    # libvirt hung the checkpoint that was made meanwhile under what was only then adopted.
    assert {finding.code for finding in scene.findings()} <= {"wrong-parent"}
    scene.free.repair()
    scene.require_clean()


def _redefine(scene: Scene) -> Task:
    scene.grow(2)
    name = scene.line[-1]
    document = scene.domain.document(name)
    scene.domain.delete(name, metadata=True)
    scene.lost.add(name)
    return scene.task("redefine", document=document)


def _redefined(scene: Scene) -> None:
    """Until it is redefined, its bitmaps belong to no checkpoint, and check says so."""
    listed = {view.name for view in scene.domain.checkpoints().checkpoints}
    findings = scene.findings()
    if findings:
        assert {finding.code for finding in findings} == {"orphan-bitmap"}
        scene.free.repair(foreign=True)
        scene.require_clean()
    assert scene.lost & listed or findings


def _damage(scene: Scene) -> Task:
    """One of each that repair has a cure for."""
    scene.grow(3)
    before = scene.line[-2]
    metadata_only = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    scene.machine.domain.checkpointLookupByName(before).delete(metadata_only)
    _foreign(scene)
    node = scene.machine.node("vdb")
    scene.machine.qmp("block-dirty-bitmap-remove", node=node, name=before)
    scene.machine.qmp("block-dirty-bitmap-add", node=node, name=f"stranger{scene.writes}")
    scene.domain.adapter.set_marker(None)
    return replace(scene.task("repair", foreign=True), engine=None)


def _repaired(scene: Scene) -> None:
    scene.free.repair(foreign=True)
    scene.require_clean()


_LIBVIRT, _MONITOR, _OFFLINE = EngineName

_ADOPT = Scenario("adopt", _LIBVIRT, _adopt, _adopted, unfinished=frozenset({"libvirt-only"}))
_ARCHIVE = Scenario("archive", _LIBVIRT, _archive)
_CHILDREN = Scenario("delete with children", _LIBVIRT, _delete_children)
_LATER = Scenario("create a later one", _LIBVIRT, _later)
_LATER_MONITOR = replace(_LATER, engine=_MONITOR)
_MIDDLE = Scenario("delete in the middle", _LIBVIRT, _delete_middle)
_REDEFINE = Scenario("redefine", _LIBVIRT, _redefine, _redefined)
_REPAIR = Scenario(
    "repair",
    _LIBVIRT,
    _damage,
    _repaired,
    unfinished=frozenset({"libvirt-only", "store-only", "orphan-bitmap"}),
)

_OURS = (
    Scenario("create the first", _LIBVIRT, _first),
    _LATER,
    _MIDDLE,
    Scenario("delete the current one", _LIBVIRT, _delete_current),
    _CHILDREN,
    _ARCHIVE,
    _ADOPT,
    _REDEFINE,
    _REPAIR,
)

# What goes to the store is the same with every engine.
_OURS_ON_OTHER_ENGINES = (
    Scenario("create the first", _MONITOR, _first),
    _LATER_MONITOR,
    replace(_MIDDLE, engine=_MONITOR),
    replace(_LATER, engine=_OFFLINE),
    replace(_MIDDLE, engine=_OFFLINE),
)

# Of these the engine's steps alone count: QEMU and libvirtd know nothing of the store.
_CRASHES = (
    *((Victim.QEMU, each) for each in (_LATER, _MIDDLE, _ARCHIVE, _ADOPT, _REPAIR)),
    *((Victim.HOST, each) for each in (_LATER, _MIDDLE)),
    *((Victim.LIBVIRTD, each) for each in (_LATER, _MIDDLE, _ARCHIVE, _ADOPT, _REPAIR)),
)

_MORE_CRASHES = (
    *((Victim.QEMU, each) for each in (_LATER_MONITOR, _CHILDREN)),
    *((Victim.HOST, each) for each in (_LATER_MONITOR, _CHILDREN, _ARCHIVE, _ADOPT, _REPAIR)),
    *((Victim.LIBVIRTD, each) for each in (_LATER_MONITOR, _CHILDREN)),
)

Case = tuple[Victim, Scenario]


def cases(*, long: bool) -> list[Case]:
    """Who is killed in which operation; `long`: in some more, and at more points."""
    return [
        *((Victim.PROCESS, each) for each in _OURS),
        *((Victim.PROCESS, replace(each, steps_only=not long)) for each in _OURS_ON_OTHER_ENGINES),
        *_CRASHES,
        *(_MORE_CRASHES if long else ()),
    ]
