"""A prune that is killed, or finds the disk full, at any step loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.repository import Repository
from ckptmgr.errors import RepositoryFailed

from .kept_points import Kept
from .pruned import (
    GONE,
    MIB,
    at_every_call,
    calls_of,
    copies,
    fork,
    killed_at,
    let_go,
    require_tidy,
    week,
)


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_killed_at_any_step_every_point_is_whole_and_the_next_one_completes_it(
    tmp_path: Path,
) -> None:
    total = calls_of(tmp_path / "dry")
    assert total > 50
    states = set()
    for number, kept in copies(fork(tmp_path / "original" / "repo"), tmp_path, total):
        assert killed_at(number, kept) == -signal.SIGKILL
        there = set(kept.lineage.load().points.manifests)
        assert there >= {"mo", "we", "fr"}
        states.add((GONE in there, (kept.lineage.path / "prune.json").exists()))
        kept.require(there, qemu=number % 8 == 0)  # as any reader finds it, without the lock
        if number % 2:  # a backup comes first
            with kept.lineage.lock(0):
                kept.lineage.settle()
            kept.require(there, qemu=False)
        let_go(kept, GONE)
        kept.require({"mo", "we", "fr"}, qemu=number % 8 == 0)
        require_tidy(kept, check=number % 8 == 0)
    assert states == {(True, False), (True, True), (False, False)}


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path: Path) -> None:
    total = calls_of(tmp_path / "dry")
    for number, kept in copies(fork(tmp_path / "original" / "repo"), tmp_path, total):

        def act(call: int, number: int = number) -> None:
            if call == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with at_every_call(act), contextlib.suppress(RepositoryFailed):
            # (What cannot be removed by an undoing that is under way anyway is no new failure.)
            let_go(kept, GONE)
        there = set(kept.lineage.load().points.manifests)
        assert there >= {"mo", "we", "fr"}
        kept.require(there, qemu=False)
        let_go(kept, GONE)
        kept.require({"mo", "we", "fr"}, qemu=False)
        require_tidy(kept, check=False)


def on_a_full_file_system(folder: Path) -> None:
    """Run by the test below in a mount namespace of its own."""
    kept = week(folder / "repo")
    size = sum(path.stat().st_size for path in kept.repository.rglob("*") if path.is_file())
    small = folder / "small"
    small.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 4 * MIB}", "none", str(small)], check=True
    )
    shutil.copytree(kept.repository, small / "repo")
    there = Kept(Repository(small / "repo").lineage(kept.lineage.key), kept.contents)
    filler = small / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(BLOCK))
    with pytest.raises(RepositoryFailed, match="No space left on device") as error:
        let_go(there, "tu")
    assert "ckptmgr prune" in (error.value.hint or "")
    there.require({"mo", "tu", "we", "th", "fr", "sa"})
    filler.unlink()
    let_go(there, "tu")
    there.require({"mo", "we", "th", "fr", "sa"})
    require_tidy(there)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(RepositoryFailed, match="Read-only file system"):
        let_go(there, "we")
    there.require({"mo", "we", "th", "fr", "sa"})


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from integration import test_prune_interrupted as test; "
        "test.on_a_full_file_system(pathlib.Path(sys.argv[1])); print('done')"
    )
    unshare = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    )
    done = subprocess.run(
        [*unshare, sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# --- damage ----------------------------------------------------------------------------------
