"""A machine with its checkpoints, and what has to come out of every diff between them."""

from __future__ import annotations

from ckptmgr.checkpoint import EngineName
from ckptmgr.config import Settings
from ckptmgr.domain.known import known_names, known_parent
from ckptmgr.manager import Domain, Host
from ckptmgr.store import Store
from ckptmgr.views import CheckpointView
from integration.stacks import Stack
from integration.stand import Machine, rounded

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
