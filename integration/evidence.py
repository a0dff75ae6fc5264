"""What is really there, asked without ckptmgr: bytes written, bitmaps, and what must not change."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import libvirt

import ckptmgr
from ckptmgr.config import Settings
from ckptmgr.manager import Host
from ckptmgr.store import Store
from integration.stand import MIB, DiskSpec, Machine, rounded
from integration.stand.images import info

DISKS = (
    DiskSpec("vda", size=12 * MIB + 1536, cluster_size=2 * MIB),  # the last granule is not whole
    DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2", "raw")),
    DiskSpec("vdc", size=5 * MIB, format="raw"),
    DiskSpec("sda", size=2 * MIB, cluster_size=512),
)

# QEMU's default: the cluster size, from 4 to 64 KiB.
GRANULARITY = {"vda": 65536, "vdb": 4096, "vdc": 65536, "sda": 4096}

Extents = list[tuple[int, int]]
Bitmaps = set[tuple[str, str]]


def domain_of(
    machine: Machine, store: Path, engine: str = "auto", **settings: float
) -> ckptmgr.Domain:
    """What ``ckptmgr.connect(uri, store=..., engine=...).domain(name)`` gives, on the connection
    that the stand has already, and with settings as in ckptmgr.toml.
    """
    asked = None if engine == "auto" else ckptmgr.EngineName(engine)
    host = Host(machine.stand.connection, Store(store), Settings(**settings), asked)  # type: ignore[arg-type]
    return host.domain(machine.name)


class Timeline:
    """Every range that was written on a machine's disks, and between which checkpoints.

    ``cut(name)`` goes with the making of each checkpoint.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.sizes = {disk.target: disk.size for disk in machine.disks}
        self.cuts: list[str] = []
        self._contents: dict[str, dict[str, bytes]] = {}
        self._written = [self._nothing()]
        self._pattern = 0
        self._random = random.Random("ckptmgr")

    def continued(self, machine: Machine) -> Timeline:
        """This one until now, which goes on with a machine whose images are copies."""
        other = Timeline(machine)
        other.cuts = list(self.cuts)
        other._contents = dict(self._contents)
        other._written = deepcopy(self._written)
        other._pattern = self._pattern
        other._random.setstate(self._random.getstate())
        return other

    def _nothing(self) -> dict[str, Extents]:
        return {target: [] for target in self.sizes}

    def write(self, target: str, offset: int, length: int) -> None:
        """Write bytes that differ from what was there."""
        self._pattern = self._pattern % 255 + 1
        self.machine.write(target, offset, length, self._pattern)
        self._written[-1][target].append((offset, length))
        self._contents.pop("", None)

    def scatter(self) -> None:
        """Odd ranges on every disk: across granules, within one, up to the last byte."""
        for target, size in self.sizes.items():
            offset = self._random.randrange(size - 300_000)
            self.write(target, offset, self._random.randrange(1, 300_000))
        last = self._random.choice(list(self.sizes))
        length = self._random.randrange(1, 5000)
        self.write(last, self.sizes[last] - length, length)

    def cut(self, name: str) -> None:
        """A checkpoint called `name` was made now."""
        self._contents[name] = self._now()
        self._written.append(self._nothing())
        self.cuts.append(name)

    def _now(self) -> dict[str, bytes]:
        if "" not in self._contents:
            self._contents[""] = {target: self.machine.contents(target) for target in self.sizes}
        return self._contents[""]

    def expected(self, target: str, start: str, end: str | None, granularity: int) -> Extents:
        """The granules with a byte that was written between two checkpoints, or since one."""
        first = self.cuts.index(start)
        last = len(self.cuts) if end is None else self.cuts.index(end)
        intervals = self._written[first + 1 : last + 1]
        written = [each for interval in intervals for each in interval[target]]
        return rounded(written, granularity, self.sizes[target])

    def check(self, domain: ckptmgr.Domain, start: str, end: str | None, tracked: set[str]) -> None:
        """The diff has exactly the granules written, and no byte differs outside of them."""
        diff = domain.diff(start, end)
        where = f"{start}..{end}"
        assert {disk.name for disk in diff.disks if disk.known} == tracked, where
        before = self._contents[start]
        after = self._now() if end is None else self._contents[end]
        for disk in diff.disks:
            if not disk.known:
                assert disk.reason
                assert disk.extents() == [(0, self.sizes[disk.name])]
                continue
            granularity = GRANULARITY[disk.name]
            expected = self.expected(disk.name, start, end, granularity)
            assert disk.extents() == expected, f"{where} on {disk.name}"
            assert disk.granularity == granularity
            assert disk.dirty_bytes == sum(length for _, length in expected)
            for begin, past in gaps(expected, self.sizes[disk.name]):
                same = before[disk.name][begin:past] == after[disk.name][begin:past]
                assert same, f"{where} on {disk.name}: a byte in {begin}..{past} differs"

    def check_all(self, domain: ckptmgr.Domain, names: Sequence[str], tracked: set[str]) -> None:
        """Every pair of checkpoints, and since each one until now."""
        self.check_pairs(domain, names, tracked)
        for start in names:
            self.check(domain, start, None, tracked)

    def check_pairs(self, domain: ckptmgr.Domain, names: Sequence[str], tracked: set[str]) -> None:
        """Every pair of checkpoints."""
        for start, end in combinations(names, 2):
            self.check(domain, start, end, tracked)


def gaps(extents: Extents, size: int) -> Iterator[tuple[int, int]]:
    """(begin, past) of what `extents` leave out."""
    borders = [
        0,
        *(border for start, length in extents for border in (start, start + length)),
        size,
    ]
    pairs = list(pairwise(borders))
    return iter(pairs[::2])


def bitmaps(machine: Machine) -> Bitmaps:
    """(image, bitmap) on every layer of every disk, as QMP or ``qemu-img info`` says."""
    if machine.active:
        return {
            (Path(node["file"]).name, bitmap["name"])
            for node in _nodes(machine)
            for bitmap in node.get("dirty-bitmaps", [])
        }
    return {(image.name, bitmap["name"]) for image in _images(machine) for bitmap in _held(image)}


def on_tops(machine: Machine, targets: Iterable[str], *names: str) -> Bitmaps:
    """What `bitmaps` should be where each of `targets` has just these, on its top layer."""
    return {(machine.images[target].name, name) for target in targets for name in names}


def known(machine: Machine) -> dict[str, str | None]:
    """The checkpoints that libvirt has, with their parents."""
    found = {}
    for checkpoint in machine.domain.listAllCheckpoints():
        try:
            found[checkpoint.getName()] = checkpoint.getParent().getName()
        except libvirt.libvirtError:
            found[checkpoint.getName()] = None
    return found


def has_checkpoints(machine: Machine) -> bool:
    """Whether the machine's libvirt has checkpoints at all (7.0 has not)."""
    return machine.stand.kind != "debian11"


def told(machine: Machine, parents: Mapping[str, str | None]) -> dict[str, str | None]:
    """What `known` has to be where `parents` was made."""
    return dict(parents) if has_checkpoints(machine) else {}


def _nodes(machine: Machine) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = machine.qmp("query-named-block-nodes", flat=True)
    return nodes


def _images(machine: Machine) -> list[Path]:
    return [path for path in sorted(machine.folder.iterdir()) if path.is_file()]


def _held(image: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        info(image).get("format-specific", {}).get("data", {}).get("bitmaps", [])
    )
    return found


def everything(machine: Machine, store: Path) -> dict[str, Any]:
    """All that a refused command must leave as it was.

    The store's files byte by byte (the lock aside), libvirt's checkpoints and its definition of
    the domain with the marker, jobs, and of every layer the bitmaps with their state and count.
    """
    state: dict[str, Any] = {
        "store": files(store),
        "definition": machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
        "checkpoints": {
            checkpoint.getName(): checkpoint.getXMLDesc()
            for checkpoint in machine.domain.listAllCheckpoints()
        },
    }
    if machine.active:
        state["job"] = machine.domain.jobInfo()[0]
        state["exports"] = machine.qmp("query-block-exports")
        state["nodes"] = sorted(
            (node["node-name"], node["ro"], sorted(map(str, node.get("dirty-bitmaps", []))))
            for node in _nodes(machine)
        )
    else:
        state["images"] = {path.name: _held(path) for path in _images(machine)}
    return state


def files(folder: Path) -> dict[str, str]:
    """The files in a folder and its subfolders, and their digests; locks aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@contextmanager
def unchanged(machine: Machine, store: Path) -> Iterator[None]:
    """Fails if the block changes anything of a machine or its store."""
    before = everything(machine, store)
    yield
    assert everything(machine, store) == before


def wipe(machine: Machine) -> None:
    """Take every checkpoint and bitmap from a machine, so that the next test can have it."""
    for checkpoint in machine.domain.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    if machine.active:
        for node in _nodes(machine):
            for bitmap in node.get("dirty-bitmaps", []):
                arguments = {"node": node["node-name"], "name": bitmap["name"]}
                machine.qmp("block-dirty-bitmap-remove", **arguments)
        return
    for image in _images(machine):
        for bitmap in _held(image):
            subprocess.run(["qemu-img", "bitmap", "--remove", image, bitmap["name"]], check=True)
