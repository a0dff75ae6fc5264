"""``python -m integration.bench.history``: what a long history costs, and large answers.

One machine gets a thousand checkpoints of ckptmgr's, archived as they are made; another, beside
it, as many of libvirt's own.  Takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
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
from .report import machine as where

WRITES = 4
"""Writes between two checkpoints, each in a granule of its own."""

GRANULE = 65536
AT_ENDS = 50
"""So many creates at each end of the history are compared."""

MILLION = 1_000_000


@dataclass
class Course:
    """What one machine's checkpoints cost, from the first to the last.

    create, archive -- seconds each
    start -- seconds of the machine's start, with the first and with all checkpoints
    memory -- MiB of the running QEMU's, likewise, and of the restarted one's
    """

    create: list[float] = field(default_factory=list)
    archive: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    restarted: list[float] = field(default_factory=list)


class Grown:
    """A machine, and how it gets a checkpoint."""

    def __init__(self, machine: Machine, create: Callable[[str], object]) -> None:
        self.machine = machine
        self.course = Course()
        self._create = create
        self._device = machine.device("vda")

    def write(self, number: int) -> None:
        """What goes into interval `number`; without data, which bitmaps do not care for."""
        for write in range(WRITES):
            offset = (number * WRITES + write) * 2 * GRANULE
            self.machine.hmp(f'qemu-io -d {self._device} "write -z {offset} 4096"')

    def create(self, name: str) -> None:
        """Make one checkpoint."""
        self.course.create.append(_seconds(lambda: self._create(name)))

    def weigh(self) -> None:
        """Take the memory, and start the machine anew."""
        self.course.memory.append(memory(self.machine.pid))
        self.machine.stop()
        self.course.start.append(_seconds(self.machine.start))
        self.course.restarted.append(memory(self.machine.pid))


def grow(ours: Grown, domain: ckptmgr.Domain, plain: Grown, count: int) -> None:
    """Make `count` checkpoints on both machines, in turns."""
    for number in range(count):
        for each in (ours, plain):
            each.write(number)
            each.create(name(number))
        ours.course.archive.append(_seconds(lambda: domain.archive(keep=1)))
        if number in (0, count - 1):
            for each in (ours, plain):
                each.weigh()


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


def costs(command: Sequence[str | Path]) -> tuple[float, float]:
    """Seconds that a command takes and the most memory it holds, in MiB; its output is dropped.

    The memory is looked up again and again: what wait4 tells has that of its parent in it.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    most = 0.0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            most = max(most, memory(process.pid))
        time.sleep(0.003)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - begun, most


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


def beside(image: Path, bitmap: str) -> dict[str, tuple[float, float]]:
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


def scatter(image: Path, extents: int) -> None:
    """Write so many extents, every other granule of 4 KiB from the beginning."""
    with tempfile.TemporaryFile("w+") as commands:
        commands.writelines(f"write -z {number * 8192} 4096\n" for number in range(extents))
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


def _diff(stand: Daemon, store: Path, *words: str) -> list[str | Path]:
    connected = ["-c", stand.uri, "--store", str(store)]
    return [sys.executable, "-m", "ckptmgr", *connected, "--json", "diff", "--extents", *words]


def _long(stand: Daemon, count: int) -> Iterator[str]:
    store = stand.workspace.folder("store")
    machine, other = Machine(stand, (disk(count),)), Machine(stand, (disk(count),))
    with ckptmgr.connect(stand.uri, store=store, engine="libvirt") as host:
        domain = host.domain(machine.name)
        bare = Bare(other.domain, stand.workspace.folder("bare"))
        ours, plain = Grown(machine, domain.create), Grown(other, bare.create)
        grow(ours, domain, plain, count)
        folder = store / domain.view.uuid
    yield f"{count} checkpoints on a machine, first against last:"
    yield ""
    yield "| | first | last | ratio |"
    yield "|---|---:|---:|---:|"
    rows = (
        ("create, ms", ours.course.create, 1000),
        ("archive --keep 1, ms", ours.course.archive[1:], 1000),
        ("libvirt alone: checkpointCreateXML, ms", plain.course.create, 1000),
    )
    for what, seconds, unit in rows:
        # The first checkpoint ends no interval.
        first, last = seconds[1 : AT_ENDS + 1], seconds[-AT_ENDS:]
        yield _row(what, unit * statistics.median(first), unit * statistics.median(last))
    for whose, course in (("", ours.course), ("libvirt alone: ", plain.course)):
        yield _row(f"{whose}start of the machine, s", *course.start)
        yield _row(f"{whose}memory of QEMU, MiB", *course.memory)
        yield _row(f"{whose}the same after a new start, MiB", *course.restarted)
    yield ""
    yield f"The store: {stored(folder) / count / 1024:.1f} KiB a checkpoint."
    yield ""
    other.stop()
    span = (machine.name, name(0), name(count - 1))
    commands = {f"ckptmgr diff, {count - 1} intervals": costs(_diff(stand, store, *span))}
    commands |= beside(other.images["vda"], name(0))
    yield from _commands(commands)
    machine.destroy()
    other.destroy()


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


def _row(what: str, first: float, last: float) -> str:
    return f"| {what} | {first:.1f} | {last:.1f} | {last / first:.2f} |"


def _commands(found: dict[str, tuple[float, float]]) -> Iterator[str]:
    yield "| command | s | MiB |"
    yield "|---|---:|---:|"
    for what, (seconds, held) in found.items():
        yield f"| {what} | {seconds:.2f} | {held:.0f} |"


if __name__ == "__main__":
    main()
