"""``python -m integration.bench.history``: what a long history costs, and large answers.

One machine gets a thousand checkpoints of ckptmgr's, archived as they are made; another, beside
it, as many of libvirt's own.  The last of them are made in turns with those of two machines that
have hardly any yet, so that whatever else this one does slows down both.  Takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ckptmgr
from integration.stand import MIB, Daemon, DiskSpec, Machine, Workspace, adopt, private_mounts

from .bare import Bare
from .cost import processor
from .report import machine as where

WRITES = 4
"""Writes between two checkpoints, each in a granule of its own."""

GRANULE = 65536
ROUNDS = 50
"""So many checkpoints of a long and of a short history are compared."""

STARTS = 7
"""So many starts of each machine, and commands of each kind."""

MILLION = 1_000_000

Domain = ckptmgr.Domain


@dataclass
class Course:
    """What a machine's checkpoints cost.

    create, archive, start -- seconds each
    processor -- of each create, seconds of processor time: of this process, libvirtd and QEMU
    starting -- of each start, seconds of processor time: of libvirtd and QEMU
    command -- of each create by the command line, seconds of its processor time
    memory -- MiB of the running QEMU's, before the first new start
    restarted -- and after each
    """

    create: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    archive: list[float] = field(default_factory=list)
    command: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    starting: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    restarted: list[float] = field(default_factory=list)


class Grown:
    """A machine, and how it gets a checkpoint.

    archived -- the domain that old bitmaps are let go of after each checkpoint; None: they stay
    """

    def __init__(
        self,
        machine: Machine,
        create: Callable[[str], object],
        archived: Domain | None = None,
    ) -> None:
        self.machine = machine
        self.course = Course()
        self.made = 0
        self._create = create
        self._archived = archived
        self._device = machine.device("vda")

    def write(self) -> None:
        """What goes into the next interval; without data, which bitmaps do not care for."""
        for write in range(WRITES):
            offset = (self.made * WRITES + write) * 2 * GRANULE
            self.machine.hmp(f'qemu-io -d {self._device} "write -z {offset} 4096"')

    def grow(self) -> None:
        """Write, make one checkpoint, and archive."""
        self.write()
        begun = self._processor()
        self.course.create.append(_seconds(lambda: self._create(name(self.made))))
        self.course.processor.append(self._processor() - begun)
        self.made += 1
        if self._archived is not None:
            domain = self._archived
            self.course.archive.append(_seconds(lambda: domain.archive(keep=1)))

    def _processor(self) -> float:
        return time.process_time() + self._daemon() + processor(self.machine.pid)

    def _daemon(self) -> float:
        stand = self.machine.stand
        return processor(stand.pid) if isinstance(stand, Daemon) else 0.0

    def grow_by(self, command: Sequence[str | Path]) -> None:
        """The same by a command, to which the checkpoint's name is added."""
        self.write()
        self.course.command.append(costs([*command, name(self.made)]).processor)
        self.made += 1
        if self._archived is not None:
            self._archived.archive(keep=1)

    def start(self) -> None:
        """Take the memory, and start the machine anew."""
        self.course.memory.append(memory(self.machine.pid))
        self.machine.stop()
        begun = self._daemon()
        self.course.start.append(_seconds(self.machine.start))
        self.course.starting.append(self._daemon() - begun + processor(self.machine.pid))
        self.course.restarted.append(memory(self.machine.pid))


def in_turns(rounds: int, machines: Sequence[Grown], do: Callable[[Grown], None]) -> None:
    """Do something with each machine, again and again; every other round in reverse order."""
    for number in range(rounds):
        for each in machines if number % 2 else machines[::-1]:
            do(each)


def name(number: int) -> str:
    """The checkpoints are called so."""
    return f"c{number:04}"


def disk(count: int) -> DiskSpec:
    """A disk large enough for the writes of so many intervals."""
    return DiskSpec("vda", size=max(MIB, 2 * GRANULE * WRITES * count))


def memory(pid: int) -> float:
    """What a process holds in memory, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def stored(folder: Path) -> int:
    """Bytes in the files of a folder and of those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# --- commands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock and of processor time, and the most memory that is held, in MiB."""

    seconds: float
    processor: float
    memory: float


def costs(command: Sequence[str | Path]) -> Cost:
    """What a command costs; its output is dropped.

    The memory is looked up again and again: what wait4 tells has that of its parent in it.
    """
    begun, used = time.perf_counter(), _used()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    most = 0.0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            most = max(most, memory(process.pid))
        time.sleep(0.003)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(time.perf_counter() - begun, _used() - used, most)


def _used() -> float:
    """Processor time of the commands that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def served(image: Path, bitmap: str) -> Iterator[str]:
    """A bitmap of an image over NBD; gives the socket's path."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/nbd"
        command: list[str | Path] = [
            "qemu-nbd",
            "-r",
            "-t",
            "-f",
            "qcow2",
            "-B",
            bitmap,
            "-k",
            socket,
            image,
        ]
        process = subprocess.Popen(command)
        try:
            while not Path(socket).exists():
                if process.poll() is not None:
                    raise RuntimeError(f"qemu-nbd does not serve {bitmap} of {image}")
                time.sleep(0.01)
            yield socket
        finally:
            process.terminate()
            process.wait()


def beside(image: Path, bitmap: str) -> dict[str, Cost]:
    """What nbdinfo and qemu-img take for a bitmap of an image."""
    context = f"qemu:dirty-bitmap:{bitmap}"
    with served(image, bitmap) as socket:
        options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap={context}"
        return {
            "nbdinfo --map": costs(
                ["nbdinfo", f"--map={context}", f"nbd+unix:///?socket={socket}"]
            ),
            "qemu-img map": costs(["qemu-img", "map", "--output=json", "--image-opts", options]),
        }


def scatter(image: Path, extents: int, how: str = "-z") -> None:
    """Write so many extents, every other granule of 4 KiB from the beginning; as zeroes."""
    with tempfile.TemporaryFile("w+") as commands:
        commands.writelines(f"write {how} {number * 8192} 4096\n" for number in range(extents))
        commands.seek(0)
        subprocess.run(
            ["qemu-io", "-t", "unsafe", "-f", "qcow2", image],
            stdin=commands,
            stdout=subprocess.DEVNULL,
            check=True,
        )


# --- the whole --------------------------------------------------------------------------------


def main() -> None:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.history")
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--extents", type=int, default=MILLION)
    asked = parser.parse_args()
    if os.geteuid() == 0:
        private_mounts()
    adopt()
    with Workspace() as workspace:
        stand = Daemon(workspace)
        for line in (
            *_long(stand, asked.checkpoints),
            "",
            *_wide(stand, asked.extents),
            "",
            f"{where()}.",
        ):
            print(line, flush=True)
        stand.close()


def _command(stand: Daemon, store: Path, *words: str) -> list[str | Path]:
    connected = ["-c", stand.uri, "--store", str(store), "--quiet"]
    return [sys.executable, "-m", "ckptmgr", *connected, *words]


def _diff(stand: Daemon, store: Path, *words: str) -> list[str | Path]:
    return _command(stand, store, "--json", "diff", "--extents", *words)


def _long(stand: Daemon, count: int) -> Iterator[str]:
    store = stand.workspace.folder("store")
    rounds, starts = min(ROUNDS, count // 2), min(STARTS, count // 2)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ckptmgr.connect(stand.uri, store=store, engine="libvirt"))

        def made(size: int) -> tuple[Grown, Grown]:
            machines = Machine(stand, (disk(size),)), Machine(stand, (disk(size),))
            for each in machines:
                stack.callback(each.destroy)
            domain = host.domain(machines[0].name)
            bare = Bare(machines[1].domain, stand.workspace.folder("bare"))
            return Grown(machines[0], domain.create, domain), Grown(machines[1], bare.create)

        old = made(count)
        in_turns(count - rounds - starts, old, Grown.grow)
        # The first checkpoint ends no interval.
        young = made(count)
        in_turns(1, young, Grown.grow)
        for each in (*old, *young):
            each.course = Course()
        in_turns(rounds, (*old, *young), Grown.grow)

        def by_command(each: Grown) -> None:
            each.grow_by(_command(stand, store, "create", each.machine.name))

        in_turns(starts, (old[0], young[0]), by_command)
        in_turns(starts, old[1:], Grown.grow)
        in_turns(starts, (*old, *young), Grown.start)
        yield from _compared(old, young)
        size = stored(store / host.domain(old[0].machine.name).view.uuid)
        yield f"The store: {size / old[0].made / 1024:.1f} KiB a checkpoint."
        yield ""
        for each in old:
            each.machine.stop()
        span = (old[0].machine.name, name(0), name(count - 1))
        commands = {f"ckptmgr diff, {count - 1} intervals": costs(_diff(stand, store, *span))}
        commands |= beside(old[1].machine.images["vda"], name(0))
        yield from _commands(commands)


def _compared(old: tuple[Grown, Grown], young: tuple[Grown, Grown]) -> Iterator[str]:
    yield f"| checkpoints | {young[0].made} | {old[0].made} | ratio |"
    yield "|---|---:|---:|---:|"
    ours, plain = (young[0].course, old[0].course), (young[1].course, old[1].course)

    def row(
        what: str,
        courses: tuple[Course, Course],
        column: Callable[[Course], list[float]],
        typical: Callable[[list[float]], float] = statistics.median,
    ) -> str:
        few, many = (typical(column(course)) for course in courses)
        scale = 1 if "MiB" in what else 1000
        return f"| {what} | {few * scale:.1f} | {many * scale:.1f} | {many / few:.2f} |"

    yield row("create, ms", ours, lambda course: course.create)
    of_all = "its processor time, ms: ckptmgr, libvirtd, QEMU"  # counted in steps of 10 ms
    yield row(of_all, ours, lambda course: course.processor, statistics.mean)
    yield row("archive --keep 1, ms", ours, lambda course: course.archive)
    yield row("`ckptmgr create`: its processor time, ms", ours, lambda course: course.command)
    yield row("libvirt alone: checkpointCreateXML, ms", plain, lambda course: course.create)
    yield row("its processor time, ms", plain, lambda course: course.processor, statistics.mean)
    for whose, courses in (("", ours), ("libvirt alone: ", plain)):
        yield row(f"{whose}start of the machine, ms", courses, lambda course: course.start)
        yield row("its processor time, ms", courses, lambda each: each.starting, statistics.mean)
        yield row(f"{whose}memory of QEMU, MiB", courses, lambda course: course.memory[:1])
        after = "the same after a new start, MiB"
        yield row(f"{whose}{after}", courses, lambda course: course.restarted)
    yield ""


def _wide(stand: Daemon, extents: int) -> Iterator[str]:
    store = stand.workspace.folder("store")
    spec = DiskSpec("vda", size=8192 * extents, cluster_size=4096)
    machine = Machine(stand, (spec,), state="stopped")
    with ckptmgr.connect(stand.uri, store=store) as host:
        host.domain(machine.name).create("c0")
    scatter(machine.images["vda"], extents)
    commands = {"ckptmgr diff, domain stopped": costs(_diff(stand, store, machine.name, "c0"))}
    commands |= beside(machine.images["vda"], "c0")
    machine.start()
    commands["ckptmgr diff, domain running"] = costs(_diff(stand, store, machine.name, "c0"))
    yield f"A map of {extents} extents:"
    yield ""
    yield from _commands(commands)
    machine.destroy()


def _commands(found: dict[str, Cost]) -> Iterator[str]:
    yield "| command | s | CPU s | MiB |"
    yield "|---|---:|---:|---:|"
    for what, cost in found.items():
        yield f"| {what} | {cost.seconds:.2f} | {cost.processor:.2f} | {cost.memory:.0f} |"


if __name__ == "__main__":
    main()
