"""``python -m integration.bench.backup``: backup and restore beside other tools.

Each case is one running machine with one disk; what is compared runs in turns on it.  Every copy is
made durable, and the time of a pull job counts from its beginning to its end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ckptmgr
from integration.stand import MIB, Daemon, DiskSpec, Machine, Workspace, adopt, private_mounts

from . import rivals
from .cost import Cost, Meter, median
from .history import scatter
from .report import machine as this_machine

PARTS = ("full", "compressed", "increment", "restore", "extents", "large")
MEMORY = Path("/dev/shm")
DISK = Path("/var/tmp")
BLOCK = 65536
LARGE = 1 << 40
EXTENTS = (("data", "-P 7", 150_000), ("zeroes", "-z", 1_000_000))
"""What is written to so many granules, every other one: a reply of QEMU has 131,072 extents."""
SHARES = (0, 1, 10, 100)
"""Per cent of the disk that changed."""

Work = Callable[[Path], Cost]
"""Makes a copy in an empty folder."""


@dataclass(frozen=True)
class Aim:
    """What ours is to be, beside some of the others.

    against -- the fastest of these; none: `most` is seconds
    most -- times the fastest one's time
    """

    most: float
    against: tuple[str, ...] = ()

    def told(self, costs: Mapping[str, Cost], ours: str) -> str:
        """Whether it is met."""
        there = [costs[name].seconds for name in self.against if name in costs]
        if self.against and not there:
            return "not measured"
        value = costs[ours].seconds / (min(there) if there else 1)
        beside = f"times {' or '.join(self.against)}" if self.against else "s"
        verdict = "met" if value <= self.most else "MISSED"
        return f"{ours}: {value:.2f} {beside}, at most {self.most:.2f}: {verdict}"


@dataclass(frozen=True)
class Bench:
    """What is measured with."""

    stand: Daemon
    size: int
    rounds: int

    def machine(self, folder: Path, data: str) -> Machine:
        """A running machine with an image full of random or compressible data."""
        raw, image = folder / "content.raw", folder / f"{data}.qcow2"
        fill(raw, self.size, data)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*command, raw, image], check=True)
        raw.unlink()
        return Machine(self.stand, (DiskSpec("vda", size=self.size, image=image),), state="running")

    def in_turns(self, folder: Path, works: Mapping[str, Work]) -> dict[str, Cost]:
        """The medians; every other round goes backwards."""
        costs: dict[str, list[Cost]] = defaultdict(list)
        names = list(works)
        for _ in range(self.rounds):
            for name in names:
                with tempfile.TemporaryDirectory(dir=folder) as target:
                    costs[name].append(works[name](Path(target)))
            names.reverse()
        return {name: median(costs[name]) for name in works}


class Ours:
    """ckptmgr on one machine, with its store and a repository in a folder."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.repository = folder / "repository"
        self._store = folder / "store"
        self._number = 0

    def backup(self, *options: str) -> Cost:
        """As a command; into the same repository, which keeps it."""
        self._number += 1
        stand = self.machine.stand
        words = ["-c", stand.uri, "--store", str(self._store), "-q", "backup", self.machine.name]
        with Meter(self.machine.pid, environment=stand.environment()) as meter:
            command = [sys.executable, "-m", "ckptmgr", *words, str(self.repository), self.point]
            meter.run(*command, *options)
        return meter.cost

    @property
    def point(self) -> str:
        """The newest."""
        return f"p{self._number}"

    def full(self, *options: str) -> Work:
        """A full one, which is forgotten again."""

        def work(_target: Path) -> Cost:
            cost = self.backup("--full", "--new", *options)
            shutil.rmtree(self.folder)
            return cost

        return work

    def in_library(self) -> Cost:
        """In this process, with the connection already there."""
        self._number += 1
        with ckptmgr.connect(self.machine.uri, store=self._store) as host:
            domain = host.domain(self.machine.name)
            with Meter(self.machine.pid) as meter:
                domain.backup(self.repository, self.point)
        return meter.cost

    @property
    def folder(self) -> Path:
        """Of the newest point."""
        return self.repository / str(self.machine.domain.UUIDString()) / self.point

    def restore(self, target: Path) -> Cost:
        """The newest point, flattened."""
        command = [sys.executable, "-m", "ckptmgr", "-q", "restore", str(self.repository)]
        with Meter() as meter:
            meter.run(*command, self.machine.name, self.point, str(target / "r"), "--flatten")
        return meter.cost


# --- content ----------------------------------------------------------------------------------


def fill(path: Path, size: int, data: str) -> None:
    """A file of random or compressible bytes, no block of which is like another."""
    with path.open("wb") as file:
        for number in range(size // MIB):
            file.write(chunk(data, number))


def chunk(data: str, number: int) -> bytes:
    """A MiB: random, or lines of text with a fourth of the entropy."""
    if data == "random":
        return os.urandom(MIB)
    lines = (f"{number:08x} {os.urandom(16).hex()} the quick brown fox\n" * 2 for _ in range(8192))
    return "".join(lines).encode().ljust(MIB, b"\n")[:MIB]


def change(machine: Machine, share: int, how: str) -> None:
    """Have the device write random data to so many per cent of vda."""
    (disk,) = machine.disks
    device = machine.device("vda")
    source = machine.folder / "new"
    source.write_bytes(os.urandom(MIB))

    def write(offset: int, length: int) -> None:
        said = machine.hmp(f'qemu-io -d {device} "write -q -s {source} {offset} {length}"')
        if said.strip():
            raise RuntimeError(said)

    total = disk.size * share // 100 // BLOCK * BLOCK
    if how == "scattered" and share < 100:
        step = 100 // share
        for number in range(total // BLOCK):
            write(number * step * BLOCK, BLOCK)
        return
    for offset in range(0, total, 64 * MIB):
        write(offset, min(64 * MIB, total - offset))


# --- the cases --------------------------------------------------------------------------------


def full(bench: Bench, place: Path, data: str) -> Iterator[str]:
    """All of a disk that is full of data."""
    with _folder(place) as folder:
        machine = bench.machine(folder, data)
        ours = Ours(machine, folder)
        works: dict[str, Work] = {
            "ckptmgr backup": ours.full(),
            "nbdcopy": lambda target: rivals.nbdcopy(machine, target),
            "qemu-img convert": lambda target: rivals.convert(machine, target),
            "push backup": lambda target: rivals.push(machine, target),
            "cp of the image": lambda target: rivals.copy_file(machine, target),
        }
        if rivals.has_virtnbdbackup():
            works["virtnbdbackup"] = lambda target: rivals.virtnbdbackup(machine, target, "copy")
        costs = bench.in_turns(folder, works)
        machine.destroy()
    aims = [Aim(1.2, ("nbdcopy", "qemu-img convert")), Aim(1 / 3, ("virtnbdbackup",))]
    yield from _table(f"Full, {data} data, {_where(place)}", costs, aims)


def compressed(bench: Bench, place: Path) -> Iterator[str]:
    """All of a disk, compressed."""
    with _folder(place) as folder:
        machine = bench.machine(folder, "compressible")
        ours = Ours(machine, folder)
        works: dict[str, Work] = {
            "ckptmgr backup": ours.full("--compress", "zstd"),
            "qemu-img convert -c (zstd)": lambda target: rivals.compress(machine, target),
        }
        if rivals.has_virtnbdbackup():
            works["virtnbdbackup -z (lz4)"] = lambda target: rivals.virtnbdbackup(
                machine, target, "copy", "-z"
            )
        costs = bench.in_turns(folder, works)
        machine.destroy()
    yield from _table(f"Full, compressible data, compressed, {_where(place)}", costs)


def increment(bench: Bench, place: Path, share: int, how: str) -> Iterator[str]:
    """What changed; virtnbdbackup on a machine of its own: it refuses others' checkpoints."""
    with _folder(place) as folder, _folder(place) as beside:
        machine = bench.machine(folder, "random")
        ours = Ours(machine, folder)
        ours.backup()
        twin = bench.machine(beside, "random") if rivals.has_virtnbdbackup() else None
        copies = beside / "copies"
        if twin is not None:
            rivals.virtnbdbackup(twin, copies, "full")
        costs: dict[str, list[Cost]] = defaultdict(list)
        for _ in range(bench.rounds):
            for name in ("ckptmgr backup", "Domain.backup()"):
                since = ours.point
                change(machine, share, how)
                with tempfile.TemporaryDirectory(dir=folder) as target:
                    pushed = rivals.push(machine, Path(target), since)
                costs["push backup"].append(pushed)
                costs[name].append(ours.backup() if name.startswith("c") else ours.in_library())
            if twin is not None:
                change(twin, share, how)
                costs["virtnbdbackup"].append(rivals.virtnbdbackup(twin, copies, "inc"))
        for each in (machine, twin):
            if each is not None:
                each.destroy()
    order = ("ckptmgr backup", "Domain.backup()", "push backup", "virtnbdbackup")
    medians = {name: median(costs[name]) for name in order if name in costs}
    title = f"Increment, {share} % changed, {how}, {_where(place)}"
    yield from _table(title, medians, [Aim(0.3)] if share == 0 else [])


def restore(bench: Bench, place: Path, *options: str, data: str = "random") -> Iterator[str]:
    """A full point and one with 10 % changed on it, made one image; options -- of the backups."""
    with _folder(place) as folder:
        machine = bench.machine(folder, data)
        ours = Ours(machine, folder)
        ours.backup(*options)
        change(machine, 10, "scattered")
        ours.backup(*options)
        image = ours.folder / "vda.qcow2"
        works: dict[str, Work] = {
            "ckptmgr restore --flatten": ours.restore,
            "qemu-img convert": lambda target: rivals.convert_image(image, target),
            "nbdcopy from qemu-nbd": lambda target: rivals.nbdcopy_image(image, target),
        }
        if rivals.has_virtnbdbackup():
            copies = folder / "copies"
            rivals.virtnbdbackup(machine, copies, "copy", *(["-z"] if options else []))
            works["virtnbdrestore, of one image"] = lambda target: rivals.virtnbdrestore(
                copies, target
            )
        costs = bench.in_turns(folder, works)
        machine.destroy()
    title = f"Restore{' of compressed points' if options else ''}, {_where(place)}"
    yield from _table(title, costs, [Aim(1.2, ("qemu-img convert",))])


def large(bench: Bench, place: Path) -> Iterator[str]:
    """A sparse disk of 1 TiB, all of it and what changed."""
    with _folder(place) as folder:
        machine = Machine(bench.stand, (DiskSpec("vda", size=LARGE),), state="running")
        ours = Ours(machine, folder)
        costs = {"full": ours.backup(), "increment": ours.backup()}
        machine.destroy()
    yield from _alone("ckptmgr backup, an empty disk of 1 TiB", costs)


def extents(bench: Bench, place: Path) -> Iterator[str]:
    """What changed is a great many extents of 4 KiB."""
    costs = {}
    for what, how, count in EXTENTS:
        with _folder(place) as folder:
            spec = DiskSpec("vda", size=8192 * count, cluster_size=4096)
            machine = Machine(bench.stand, (spec,), state="running")
            ours = Ours(machine, folder)
            ours.backup()
            machine.stop()
            scatter(machine.images["vda"], count, how)
            machine.start()
            costs[f"{count:,} of {what}"] = ours.backup()
            machine.destroy()
    yield from _alone("ckptmgr backup, extents of 4 KiB changed", costs)


Case = Callable[[Bench], Iterator[str]]
"""Measures one case, and gives its table."""


def cases(places: Sequence[Path]) -> Iterator[tuple[str, Case]]:
    """All cases, each with the part that it belongs to."""
    for place in places:
        for data in ("random", "compressible"):
            yield "full", partial(full, place=place, data=data)
    yield "compressed", partial(compressed, place=places[0])
    zstd = partial(restore, data="compressible")
    yield "compressed", lambda bench: zstd(bench, places[0], "--compress", "zstd")
    for share in SHARES:
        for how in ("contiguous", "scattered") if 0 < share < 100 else ("contiguous",):
            yield "increment", partial(increment, place=places[0], share=share, how=how)
    for place in places:
        yield "restore", partial(restore, place=place)
    yield "extents", partial(extents, place=places[0])
    yield "large", partial(large, place=places[0])


# --- the whole --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.backup")
    parser.add_argument("--size", type=int, default=2048, help="of the disk, in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument(
        "--place",
        action="append",
        type=Path,
        help=f"folder for images and copies; default: {MEMORY} and {DISK}",
    )
    asked = parser.parse_args(arguments)
    if os.geteuid() == 0:
        private_mounts()
    adopt()
    begun = time.monotonic()
    with Workspace() as workspace:
        bench = Bench(Daemon(workspace), asked.size * MIB, asked.rounds)
        if not rivals.has_virtnbdbackup():
            print(f"{rivals.MISSING}\n")
        for part, case in cases(asked.place or (MEMORY, DISK)):
            if asked.part is None or part in asked.part:
                for line in case(bench):
                    print(line, flush=True)
        bench.stand.close()
    how = f"A disk of {asked.size} MiB, medians of {asked.rounds} rounds in turns, "
    if asked.part is not None and set(asked.part) <= {"extents", "large"}:
        how = "Each measured once, "
    print(f"{how}{time.monotonic() - begun:.0f} s in all. {this_machine()}.")


@contextmanager
def _folder(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place, prefix="ckptmgr-bench-") as name:
        yield Path(name)


def _where(place: Path) -> str:
    return "in memory" if place == MEMORY else f"in {place}"


def _table(title: str, costs: Mapping[str, Cost], aims: Sequence[Aim] = ()) -> Iterator[str]:
    """Ours is the first."""
    ours = next(iter(costs))
    yield f"{title}:"
    yield ""
    yield "| | s | CPU s | MiB | ours : it, time | CPU | memory |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, cost in costs.items():
        held = f"{cost.memory:.0f}" if cost.memory else ""
        yield (
            f"| {name} | {cost.seconds:.2f} | {cost.processor:.2f} | {held} |"
            f"{'  |  |  |' if name == ours else _ratios(costs[ours], cost)}"
        )
    yield ""
    for aim in aims:
        for name in costs:
            if name == ours or (not aim.against and name.startswith("Domain")):
                yield f"- {aim.told(costs, name)}"
    if aims:
        yield ""


def _alone(title: str, costs: Mapping[str, Cost]) -> Iterator[str]:
    """What stands beside nothing else; measured once."""
    yield f"{title}:"
    yield ""
    yield "| | s | CPU s | MiB |"
    yield "|---|---:|---:|---:|"
    for name, cost in costs.items():
        yield f"| {name} | {cost.seconds:.2f} | {cost.processor:.2f} | {cost.memory:.0f} |"
    yield ""


def _ratios(ours: Cost, it: Cost) -> str:
    pairs = (
        (ours.seconds, it.seconds),
        (ours.processor, it.processor),
        (ours.memory, it.memory),
    )
    return "".join(f" {ours / it:.2f} |" if it else "  |" for ours, it in pairs)


if __name__ == "__main__":
    main()
