"""A machine with its checkpoints, and what has to come out of every diff between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ckptmgr.checkpoint import EngineName
from ckptmgr.config import Settings
from ckptmgr.domain.known import known_names, known_parent
from ckptmgr.manager import Domain, Host
from ckptmgr.store import Store
from ckptmgr.views import CheckpointView
from integration.stacks import Stack
from integration.stand import DiskSpec, Machine, rounded

LIBVIRT, MONITOR, OFFLINE = EngineName.LIBVIRT, EngineName.MONITOR, EngineName.OFFLINE

DISKS = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2", "raw")),
    DiskSpec("vdc", format="raw"),
)

Extents = list[tuple[int, int]]


class Tracked:
    """A machine of a stack, through the library.

    machine -- what is written goes through its ``write``
    engine -- None: the one that fits
    """

    def __init__(self, stack: Stack, machine: Machine, engine: EngineName | None = None) -> None:
        self.machine = machine
        self.engine = engine
        self._store = Store(stack.workspace.path / "store")
        self._made: dict[str, dict[str, int]] = {}
        """checkpoint -> target -> how many writes there were before"""
        self.move(stack)

    def move(self, stack: Stack) -> None:
        """Look for the machine on `stack` from now on."""
        self.stack = stack
        self.machine.stand = stack
        self.machine.domain = stack.handle.lookupByName(self.machine.name)

    @property
    def domain(self) -> Domain:
        """The domain, looked up anew."""
        settings = Settings(socket_directory=self.stack.sockets)
        host = Host(self.stack.connection, self._store, settings, self.engine)
        return host.domain(self.machine.name)

    def create(self, name: str) -> CheckpointView:
        """Make a checkpoint."""
        made = self.domain.create(name)
        self.noted(name)
        return made

    def noted(self, name: str) -> None:
        """A checkpoint was made just now, by whomever."""
        self._made[name] = {target: len(done) for target, done in self.machine.writes.items()}

    def write(self, number: int) -> None:
        """Write to every disk, each in another place that depends on `number`."""
        for at, target in enumerate(self.machine.images):
            self.machine.write(target, (3 * number + at) * 200_000 + 512, 70_000)

    def written(self, start: str, end: str | None = None) -> dict[str, Extents]:
        """target -> the extents that a diff has to show."""
        granularity = 65536
        found = {}
        for disk in self.machine.disks:
            if disk.target in self.machine.images:
                last = None if end is None else self._made[end][disk.target]
                writes = self.machine.writes[disk.target][self._made[start][disk.target] : last]
                found[disk.target] = rounded(writes, granularity, disk.size)
        return found

    def shown(self, start: str, end: str | None = None) -> dict[str, Extents | None]:
        """target -> the extents that the diff shows, None where that is unknown."""
        return {
            disk.name: disk.extents() if disk.known else None
            for disk in self.domain.diff(start, end).disks
        }

    def names(self) -> list[str]:
        """The checkpoints that ckptmgr knows."""
        return [each.name for each in self.domain.checkpoints(topological=True).checkpoints]

    def problems(self) -> list[str]:
        """Codes of what check finds and does not call harmless."""
        return sorted({each.code for each in self.domain.check() if not each.harmless})

    def known(self) -> dict[str, str | None]:
        """The checkpoints that libvirt knows, each with its parent."""
        adapter = self.domain.adapter
        return {name: known_parent(adapter, name) for name in known_names(adapter)}


def fitting(stack: Stack) -> EngineName:
    """The engine that has to be chosen for a running domain."""
    return stack.release.engine


def check_history(tracked: Tracked, *names: str) -> None:
    """Each interval, and the whole, are what was written; unknown only where nobody tracks."""
    assert tracked.names() == list(names)
    last = tracked.domain.checkpoint(names[-1])
    untracked = {disk.name: None for disk in last.disks if disk.bitmap is None}
    untracked.pop("hda", None)
    for start, end in [*itertools.pairwise(names), (names[0], None), (names[-1], None)]:
        assert tracked.shown(start, end) == {**tracked.written(start, end), **untracked}


def two_checkpoints(tracked: Tracked) -> None:
    """c0 and c1, with writes before, between and after."""
    for number in range(2):
        tracked.write(2 * number)
        tracked.create(f"c{number}")
        tracked.write(2 * number + 1)


def made_whole(tracked: Tracked, *line: str, also: Sequence[str] = ()) -> None:
    """Nothing is wrong but what libvirt has forgotten, which is given back to it; and `also`."""
    tells = fitting(tracked.stack) is LIBVIRT
    forgotten = tells and tracked.known().keys() != set(line)
    assert tracked.problems() == [*also, *(["store-only"] if forgotten else [])]
    tracked.domain.repair()
    assert tracked.problems() == []
    if tells:
        assert tracked.known() == dict(zip(line, [None, *line], strict=False))
    check_history(tracked, *line)


def and_a_third(tracked: Tracked, *, also: Sequence[str] = ()) -> None:
    """The history goes on as if nothing had happened.

    also -- what check finds first, and is to be cured
    """
    check_history(tracked, "c0", "c1")
    made_whole(tracked, "c0", "c1", also=also)
    tracked.write(10)
    assert tracked.create("c2").parent == "c1"
    tracked.write(11)
    check_history(tracked, "c0", "c1", "c2")
    if fitting(tracked.stack) is LIBVIRT:
        assert tracked.known()["c2"] == "c1"
    for name in ("c1", "c0"):
        tracked.domain.delete(name)
    assert tracked.shown("c2") == {**tracked.written("c2")}
    assert tracked.problems() == []
