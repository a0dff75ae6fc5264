"""A machine with its checkpoints, and what has to come out of every diff between them.

Everything is asked of QEMU, libvirt and the file system as well as of ckptmgr.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import libvirt

from ckptmgr.checkpoint import EngineName, State
from ckptmgr.config import Settings
from ckptmgr.consistency import Finding
from ckptmgr.manager import Domain, Host
from ckptmgr.store import Store
from integration.evidence import bitmaps, known, wipe
from integration.stand import MIB, Daemon, DiskSpec, Machine, await_rest, rounded
from integration.stand.patience import patiently
from integration.stand.workspace import birth

from .boundaries import Victim
from .warm import Outcome, Task, Warm


@dataclass(frozen=True)
class Shape:
    """A machine to kill things on.

    granularity -- of each disk's bitmaps
    """

    engine: EngineName
    disks: tuple[DiskSpec, ...]
    granularity: tuple[int, ...]
    state: str = "paused"


SHAPES = {
    EngineName.LIBVIRT: Shape(
        EngineName.LIBVIRT,
        (
            DiskSpec("vda", size=12 * MIB + 1536),  # the last granule is not whole
            DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2",)),
            DiskSpec("sda", size=8 * MIB),
        ),
        (65536, 4096, 65536),
    ),
    EngineName.MONITOR: Shape(
        EngineName.MONITOR,
        (
            DiskSpec("vda", size=12 * MIB + 1536),
            DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2",)),
            DiskSpec("vdc", size=8 * MIB, format="raw"),
        ),
        (65536, 4096, 65536),
    ),
    EngineName.OFFLINE: Shape(
        EngineName.OFFLINE,
        (
            DiskSpec("vda", size=12 * MIB + 1536),
            DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2",)),
            DiskSpec("vdc", size=8 * MIB),
        ),
        (65536, 4096, 65536),
        state="stopped",
    ),
}


RAW = {
    engine: Shape(
        engine,
        (DiskSpec("vda", size=2 * MIB + 1536, format="raw"),),
        (65536,),
        state=SHAPES[engine].state,
    )
    for engine in EngineName
}
"""Machines of which no disk can be tracked, but by the monitor engine."""


class Scene:
    """A machine, its store, and a record of what was written between which checkpoints.

    line -- the names of the current checkpoint and its ancestors, oldest first
    domain -- with the engine of the scene
    free -- with the engine that fits: may ask QEMU, and so sees bitmaps of nobody's as well
    lost -- checkpoints of which it may be unknown what changed before them
    """

    def __init__(self, daemon: Daemon, warm: Warm, shape: Shape) -> None:
        self.daemon = daemon
        self.warm = warm
        self.shape = shape
        self.machine = Machine(daemon, shape.disks, state=shape.state)
        self.store = Store(daemon.workspace.folder("s"))
        self.granularity = dict(
            zip((disk.target for disk in shape.disks), shape.granularity, strict=True)
        )
        self.lost: set[str] = set()
        self._libvirt_was_killed = False
        self._written: list[tuple[str, int, int]] = []
        self._made: dict[str, int] = {}
        self._number = 0
        self.connect()
        self._look()

    def connect(self) -> None:
        """Find the machine in the daemon that is there now."""
        self.machine.domain = self.daemon.handle.lookupByName(self.machine.name)
        self.domain = self._domain(self.shape.engine)
        self.free = self._domain(None)
        self.folder = self.store.directory / self.domain.view.uuid

    def _domain(self, engine: EngineName | None) -> Domain:
        host = Host(self.daemon.connection, self.store, Settings(), engine)
        return host.domain(self.machine.name)

    def _look(self) -> None:
        self._nodes = self._block_nodes()
        self._devices = {}
        if self.machine.active:
            self._devices = {
                disk.target: self.machine.device(disk.target) for disk in self.shape.disks
            }

    # --- doing --------------------------------------------------------------------------------

    def fresh(self) -> None:
        """No checkpoint, no bitmap, no store, no marker."""
        wipe(self.machine)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.domain.adapter.marker() is not None:
            self.domain.adapter.set_marker(None)
        self._written.clear()
        self._made.clear()
        self.lost.clear()

    def name(self) -> str:
        """One that no checkpoint had before."""
        self._number += 1
        return f"c{self._number}"

    def write(self) -> None:
        """Write a little to every disk, in a place of its own."""
        turn = len(self._written)
        for at, disk in enumerate(self.machine.disks):
            step = 3 * self.granularity[disk.target]
            offset = (turn + at) * step % (disk.size - 2 * step) + 512
            length = self.granularity[disk.target]  # so two granules
            self._write(disk.target, offset, length)
            self._written.append((disk.target, offset, length))

    def _write(self, target: str, offset: int, length: int) -> None:
        # Unlike Machine.write it does not read back: a write that is lost is missing in the diff.
        command = f"write -P {len(self._written) % 255 + 1} {offset} {length}"
        if self.machine.active:
            self.machine.hmp(f'qemu-io -d {self._devices[target]} "{command}"')
            return
        image = self.machine.images[target]
        form = next(disk.format for disk in self.machine.disks if disk.target == target)
        qemu_io = ["qemu-io", "-f", form, "-c", command, image]
        subprocess.run(qemu_io, check=True, stdout=subprocess.DEVNULL)

    def create(self) -> str:
        """Make a checkpoint in this process."""
        name = self.name()
        self.domain.create(name)
        self.made(name)
        return name

    def lose_next(self) -> None:
        """It may be unknown what changed before the next checkpoint."""
        self.lost.add(f"c{self._number + 1}")

    def made(self, name: str, at: int | None = None) -> None:
        """A checkpoint called `name` was made now, or after so many writes."""
        self._made[name] = len(self._written) if at is None else at

    @property
    def writes(self) -> int:
        """How many there were so far."""
        return len(self._written)

    def grow(self, length: int) -> None:
        """Have a current line of at least this length, and of no more than some more."""
        if len(self.line) > length + 6:
            self.fresh()
        while len(self.line) < length:
            self.write()
            self.create()

    @property
    def line(self) -> list[str]:
        listed = {view.name: view for view in self.domain.checkpoints().checkpoints}
        names: list[str] = []
        name = self.domain.checkpoints().current
        while name is not None:
            names.insert(0, name)
            name = listed[name].parent
        return names

    def task(self, operation: str, **arguments: object) -> Task:
        """An operation of another process on this machine."""
        return Task(
            uri=self.daemon.uri,
            store=str(self.store.directory),
            domain=self.machine.name,
            engine=self.shape.engine.value,
            operation=operation,
            arguments=arguments,
        )

    def sweep(self) -> None:
        """Remove what earlier kills left in the store, so that each deletion removes as much."""
        store = self.store.domain(self.domain.view.uuid)
        with store.lock(0):
            store.sweep()

    def kill(self, task: Task, victim: Victim, point: int, *, steps_only: bool) -> Outcome:
        """Run a task in which somebody is killed at a boundary."""
        pids = {}
        if victim in (Victim.QEMU, Victim.HOST):
            pids["qemu"] = self.machine.pid
        if victim is Victim.LIBVIRTD:
            pids["libvirtd"] = self.daemon.pid
        parts = {**vars(task), "victim": victim.value, "point": point}
        before = orphans()
        alive = {pid: birth(pid) for pid in pids.values()}
        outcome = self.warm.run(Task(**{**parts, "pids": pids, "steps_only": steps_only}))
        # QEMU lets go of its images at its very end, after its monitor; a qemu-img that was begun
        # goes on to its end, whoever is killed.
        wait_until(lambda: not any(starmap(runs, alive.items())), "who was killed has not ended")
        if self.shape.engine is EngineName.OFFLINE:
            await_orphans(before)
        if victim in (Victim.PROCESS, Victim.HOST):
            await_rest(self.daemon.pid)
        return outcome

    def restart(self, victim: Victim) -> None:
        """Bring back who was killed: libvirtd, or the machine where it died."""
        if victim is Victim.LIBVIRTD:
            self._libvirt_was_killed = True
            self.daemon.stop(kill=True)
            self.daemon.start()
            self.connect()
            if self._stands_in_a_job():
                self.machine.stop()
                self.daemon.stop()
                self.daemon.start()
                self.connect()
                self._start()
        if victim in (Victim.QEMU, Victim.HOST):
            self.machine.gone()
            self._start()

    def _start(self) -> None:
        self.machine.start()
        self._libvirt_was_killed = False
        self._look()

    def _stands_in_a_job(self) -> bool:
        """Whether libvirt was killed when it had noted that a backup job begins, and not yet which.

        It waits for the end of that for ever then, also when the machine has ended, until it is
        started anew after that.  ckptmgr says so.
        """
        with contextlib.suppress(libvirt.libvirtError):
            self.machine.domain.backupGetXMLDesc()
            return False
        try:
            return bool(self.machine.domain.jobStats()["type"] != libvirt.VIR_DOMAIN_JOB_NONE)
        except libvirt.libvirtError as error:
            if "backup job data missing" not in str(error):
                raise
            return True

    # --- seeing -------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """What check says, except for what needs no cure."""
        return [finding for finding in self.free.check() if not finding.harmless]

    def require_clean(self) -> None:
        """check has nothing to say."""
        assert not self.findings(), "; ".join(finding.message for finding in self.findings())

    def require_exact(self) -> None:
        """Every interval says just what was written, or that it is unknown where it may be lost."""
        listed = self.domain.checkpoints().checkpoints
        for view in listed:
            if view.parent is not None:
                self._require_exact(view.parent, view.name, self.lost & {view.name})
        line = self.line
        if len(line) > 2:
            self._require_exact(line[0], line[-1], self.lost.intersection(line[1:]))

    def require_exact_until_now(self) -> None:
        """The same for what was written since the newest checkpoint."""
        self.require_exact_since(self.line[-1])

    def require_exact_since(self, name: str) -> None:
        """What was written since a checkpoint is known, and no more and no less."""
        self._require_exact(name, None, set())

    def _require_exact(self, start: str, end: str | None, lost: set[str]) -> None:
        first, last = self._made[start], None if end is None else self._made[end]
        where = f"{start}..{end or ''}"
        for disk in self.domain.diff(start, end).disks:
            if not disk.known and lost:
                assert disk.reason
                assert disk.extents() == [(0, disk.size)]
                continue
            assert disk.known, f"{where}: {disk.reason}"
            size = next(each.size for each in self.machine.disks if each.target == disk.name)
            ranges = [
                (offset, length)
                for target, offset, length in self._written[first:last]
                if target == disk.name
            ]
            wanted = rounded(ranges, self.granularity[disk.name], size)
            assert disk.extents() == wanted, f"{where} of {disk.name}"

    def require_nothing_left(self) -> None:
        """No bitmap that belongs to no checkpoint, no job, server, socket, scratch or intent."""
        listed = self.domain.checkpoints().checkpoints
        recording = {
            view.name: [disk for disk in view.disks if disk.state is State.RECORDING]
            for view in listed
        }
        wanted = {
            (self.machine.images[disk.name].name, name)
            for name, disks in recording.items()
            for disk in disks
        }
        assert {each for each in bitmaps(self.machine) if not self._is_left(each[0])} == wanted
        shown = {name for name, disks in recording.items() if any(d.persistent for d in disks)}
        assert set(known(self.machine)) == shown
        assert not (self.folder / "intent.json").exists()
        if self.machine.active:
            assert self.machine.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
            assert self.machine.qmp("query-block-exports") == []
            assert self.machine.qmp("query-jobs") == []
            assert self._block_nodes() == self._nodes
            folder = self.domain.adapter.runtime_directory()
            assert [path.name for path in folder.iterdir() if "ckptmgr" in path.name] == []

    def require_swept_store(self) -> None:
        """After a delete the store has no file but what it needs."""
        self.grow(2)
        self.domain.delete(self.line[0])
        names = {path.name for path in self.folder.iterdir()}
        documents = {f"{view.name}.xml" for view in self.domain.checkpoints().checkpoints}
        assert names - {"maps"} == documents | {"domain.json", "lock"}
        maps = self.folder / "maps"
        texts = [(self.folder / name).read_text() for name in documents]
        left = [path.stem for path in maps.iterdir()] if maps.exists() else []
        assert all(any(digest in text for text in texts) for digest in left)

    def _block_nodes(self) -> set[str]:
        if not self.machine.active:
            return set()
        named = self.machine.qmp("query-named-block-nodes", flat=True)
        return {node["node-name"] for node in named if not self._is_left(node["file"])}

    def _is_left(self, image: str) -> bool:
        """Whether this is a scratch file that libvirt left in this QEMU, being killed just after
        the job's end and before it had it closed.
        """
        return self._libvirt_was_killed and image.endswith(".scratch")


def wait_until(done: Callable[[], bool], otherwise: str) -> None:
    """Wait for what comes soon.  Raises TimeoutError."""
    deadline = time.monotonic() + patiently(60)
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.002)


def runs(pid: int, since: str | None) -> bool:
    """Whether the process is there that was born then, and has not ended."""
    return since is not None and birth(pid) == since


def await_orphans(before: Mapping[int, str]) -> None:
    """Wait for what a killed process left running, by the orphans that there were before.

    A qemu-img that was begun goes on to its end, and may not have begun with the image yet.
    """
    left = [each for each in orphans().items() if each not in before.items()]
    wait_until(lambda: not any(starmap(runs, left)), "a killed process left others running")


def orphans() -> dict[int, str]:
    """Our children that run QEMU's tools, or are about to, and when they were born."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = stat.read_text().rpartition(")")
            pid, _, name = head.partition(" (")
            ours = int(tail.split()[1]) == os.getpid() and int(pid) not in Warm.pids
            if ours and name.startswith(("qemu-img", "qemu-nbd", "python")):
                since = birth(int(pid))
                if since is not None:
                    found[int(pid)] = since
    return found
