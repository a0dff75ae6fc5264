"""Trees of kept points, and what is done to them: points go, a prune is killed, data is damaged."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.backup import compaction, qcow2
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.pruning import prune
from ckptmgr.backup.repository import Repository
from ckptmgr.store import files

from .kept_points import Kept, changed, checked, noise

SIZE = 12 * BLOCK
MIB = 1 << 20


def week(path: Path, *, compress: bool = False) -> Kept:
    """mo <- tu <- we <- th, fr on tu, and sa on th that left vdb out; two disks."""
    kept = Kept.at(path)
    seed = 0
    for name, parent in [("mo", None), ("tu", "mo"), ("we", "tu"), ("th", "we"), ("fr", "tu")]:
        seed += 2
        before = {} if parent is None else kept.contents[parent]
        contents = {
            target: changed(before[target], seed) if before else noise(seed + index, SIZE)
            for index, target in enumerate(("vda", "vdb"))
        }
        kept.add(name, parent, contents, compress=compress)
    kept.add("sa", "th", {"vda": changed(kept.contents["th"]["vda"], 77)}, compress=compress)
    return kept


def let_go(kept: Kept, *names: str) -> None:
    """Prune these points and no other."""
    with kept.lineage.lock(0):
        kept.lineage.settle()
        points = kept.lineage.load().points
        gone = set(names) & set(points.manifests)
        compaction.carry_out(kept.lineage, points, prune(points, gone))


def require_tidy(kept: Kept, *, check: bool = True) -> None:
    """There is no file but those that the manifests name, and `qemu-img check` is content."""
    points = kept.lineage.load().points
    assert set(kept.lineage.names()) == {"lock", *points.manifests}
    for name, manifest in points.manifests.items():
        there = {path.name for path in (kept.lineage.path / name).iterdir()}
        assert there == {"manifest.json", *manifest.file_names}
        for disk in manifest.disks if check else ():
            assert checked(kept.lineage.image(manifest, disk.name))


def points_path(kept: Kept, name: str, disk: str) -> Path:
    return kept.lineage.image(kept.lineage.load().points.get(name), disk)


CALLS = ("_create", "_write", "_fsync", "_rename", "_unlink", "_rmdir", "_fsync_folder")


@contextmanager
def at_every_call(act: Callable[[int], None]) -> Iterator[list[str]]:
    """`act` before every call that changes the disk, with its number; and their names."""
    names: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            names.append(name)
            act(len(names))
            return call(*arguments)

        return counted

    for name in CALLS:
        patch.setattr(files, name, wrapped(name, getattr(files, name)))
    patch.setattr(qcow2, "_write", wrapped("image", qcow2._write))
    try:
        yield names
    finally:
        patch.undo()


GONE = "tu"


def fork(path: Path) -> Kept:
    """mo <- tu <- we, and fr on tu; one disk."""
    kept = Kept.at(path)
    for seed, (name, parent) in enumerate(
        [("mo", None), ("tu", "mo"), ("we", "tu"), ("fr", "tu")], start=40
    ):
        before = None if parent is None else kept.contents[parent]["vda"]
        content = noise(seed, 5 * BLOCK) if before is None else changed(before, seed)
        kept.add(name, parent, {"vda": content})
    return kept


def calls_of(folder: Path) -> int:
    kept = fork(folder / "repo")
    with at_every_call(lambda number: None) as names:
        let_go(kept, GONE)
    return len(names)


def killed_at(number: int, kept: Kept) -> int:
    """Prune in a process that is killed before a call; returns its exit status."""
    child = os.fork()
    if child == 0:

        def act(call: int) -> None:
            if call == number:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with at_every_call(act):
                let_go(kept, GONE)
        except BaseException:  # noqa: BLE001 -- this process ends here
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copies(original: Kept, folder: Path, total: int) -> Iterator[tuple[int, Kept]]:
    """A fresh copy of a repository for each of `total` calls."""
    for number in range(1, total + 1):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original.repository, copy)
        yield number, Kept(Repository(copy).lineage(original.lineage.key), original.contents)


def damage(path: Path, needle: bytes) -> None:
    """Flip a bit of `needle`, which is in the file just once."""
    content = bytearray(path.read_bytes())
    place = content.index(needle)
    content[place] ^= 1
    path.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }
