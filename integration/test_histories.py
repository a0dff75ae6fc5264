"""Random histories on real QEMU: whatever was done, no difference leaves out a byte.

A hypothesis state machine does what users, other tools and accidents do to a machine; the model
(`Branches`) has every byte of every checkpoint.  After each step, for random pairs: each byte
that differs lies inside the difference, and where no record was lost, the difference has nothing
above what is promised.

Each run prints its seeds.  ``--hypothesis-seed N`` repeats them, ``--long`` does thousands of
steps instead of some hundreds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ckptmgr.errors import OperationFailed, Unsupported
from integration import block_jobs
from integration.branch_model import GRANULARITY, Branches, Kept
from integration.stand import MIB, DiskSpec, Machine, Stand

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=6 * MIB))

STEPS = 25
"""Of one history."""

SECONDS = 45
"""After that, a normal run begins no further history with an engine."""

LONG = 1500
"""Steps of a run with --long, with each engine."""

disks = st.sampled_from([disk.target for disk in DISKS])
places = st.integers(0, 4 * MIB // GRANULARITY - 4)
shifts = st.sampled_from([0, 1, 512, 4096, GRANULARITY - 1])
lengths = st.sampled_from([1, 512, 4096, GRANULARITY, 3 * GRANULARITY - 2])
choices = st.integers(0, 1 << 16)


class Run:
    """All histories of one test.

    steps -- how many there were, by rule
    """

    def __init__(self, stand: Stand, engine: str, *, long: bool) -> None:
        self.stand = stand
        self.engine = engine
        self.steps: dict[str, int] = {}
        self._long = long
        self._begun = time.monotonic()
        self._histories = 0
        self._failed = False

    def next(self) -> bool:
        """Whether there is another history to be run."""
        self._histories += 1
        if self._failed:
            return True  # hypothesis runs it again, to print it
        if self._histories == 1:
            return False  # hypothesis begins with the one that has the first rule in each step
        if self._long:
            return sum(self.steps.values()) < LONG
        return time.monotonic() - self._begun < SECONDS

    def failed(self) -> None:
        """A history is not as it should be."""
        self._failed = True


class Histories(RuleBasedStateMachine):
    """What happens to one machine.

    run -- set by the test, in a subclass
    """

    run: Run

    def __init__(self) -> None:
        super().__init__()
        self.names = itertools.count(1)
        self.pick = 0
        self.over = not self.run.next()
        if self.over:
            return
        stand = self.run.stand
        self.machine = Machine(stand, DISKS)
        self.folder = tempfile.TemporaryDirectory(dir=stand.workspace.path)
        self.branches = Branches(self.machine, Path(self.folder.name), self.run.engine)

    def teardown(self) -> None:
        if self.over:
            return
        if isinstance(sys.exc_info()[1], Exception):
            self.run.failed()
        self.machine.destroy()
        self.folder.cleanup()

    def count(self, what: str) -> None:
        """A step was done."""
        self.run.steps[what] = self.run.steps.get(what, 0) + 1

    # --- what may be done ---------------------------------------------------------------------

    def begun(self) -> bool:
        return not self.over

    def active(self) -> bool:
        return not self.over and self.machine.active

    def stopped(self) -> bool:
        return not self.over and not self.machine.active

    def has_points(self) -> bool:
        return not self.over and bool(self.branches.points)

    def has_snapshots(self) -> bool:
        return not self.over and bool(self._usable())

    def has_overlay(self) -> bool:
        return self.active() and bool(block_jobs.below(self.machine, "vda"))

    @precondition(lambda self: self.over)
    @rule()
    def rest(self) -> None:
        """There is nothing more to be done."""

    def _usable(self) -> list[str]:
        return [name for name, kept in self.branches.snapshots.items() if not kept.stale]

    # --- the guest ----------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        """No history begins without a checkpoint: that costs too many of the steps."""
        if not self.over:
            self.branches.scatter(0)
            self.branches.create("c0")

    @precondition(begun)
    @rule(disk=disks, place=places, shift=shifts, length=lengths)
    def write(self, disk: str, place: int, shift: int, length: int) -> None:
        self.branches.write(disk, place * GRANULARITY + shift, length)
        self.count("write")

    @precondition(begun)
    @rule(disk=disks, place=places, length=st.integers(1, 4))
    def zero(self, disk: str, place: int, length: int) -> None:
        self.branches.zero(disk, place * GRANULARITY, length * GRANULARITY)
        self.count("zero-write")

    @precondition(begun)
    @rule(disk=disks, place=places, length=st.integers(1, 4))
    def discard(self, disk: str, place: int, length: int) -> None:
        self.branches.discard(disk, place * GRANULARITY, length * GRANULARITY)
        self.count("discard")

    # --- checkpoints --------------------------------------------------------------------------

    @precondition(begun)
    @rule()
    def create(self) -> None:
        self.branches.create(f"c{next(self.names)}")
        self.count("create")

    @precondition(has_points)
    @rule(choice=choices)
    def delete(self, choice: int) -> None:
        name = _pick(list(self.branches.points), choice)
        try:
            self.branches.domain.delete(name)
        except OperationFailed as error:
            # the bitmap that records, and no other could
            assert name == self.branches.at, error
            assert self.branches.points[name].parent not in self.branches.recording, error
        else:
            self.branches.deleted(name)
        self.count("delete")

    @precondition(has_points)
    @rule(keep=st.integers(1, 3))
    def archive(self, keep: int) -> None:
        self.branches.domain.archive(keep=keep)
        self.branches.archived(keep)
        self.count("archive")

    @precondition(begun)
    @rule()
    def repair(self) -> None:
        self.branches.domain.repair()
        left = [each for each in self.branches.domain.check() if not each.harmless]
        assert not left, [each.message for each in left]
        self.count("repair")

    # --- snapshots ----------------------------------------------------------------------------

    @precondition(active)
    @rule(checkpoint=st.booleans(), ours=st.booleans())
    def snapshot(self, checkpoint: bool, ours: bool) -> None:
        name = f"s{next(self.names)}"
        if ours:
            self.branches.snapshot(name, checkpoint=checkpoint)
        else:
            document = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
            self.machine.domain.snapshotCreateXML(document)
            self.branches.taken(name)
        self.count("snapshot")

    @precondition(stopped)
    @rule()
    def snapshot_of_a_stopped_machine(self) -> None:
        name = f"s{next(self.names)}"
        # libvirt up to 9.0 refuses it where there are checkpoints
        with contextlib.suppress(OperationFailed, Unsupported):
            self.branches.snapshot(name)
        self.count("snapshot, stopped")

    @precondition(has_snapshots)
    @rule(choice=choices, run=st.sampled_from([None, True, False]))
    def revert(self, choice: int, run: bool | None) -> None:
        self.branches.revert(_pick(self._usable(), choice), run=run)
        self.count("revert")

    @precondition(has_snapshots)
    @rule(choice=choices)
    def revert_behind_our_back(self, choice: int) -> None:
        name = _pick(self._usable(), choice)
        domain = self.machine.domain
        with contextlib.suppress(libvirt.libvirtError):  # 9.0: QEMU has died of it
            domain.revertToSnapshot(domain.snapshotLookupByName(name), 0)
        self.branches.moved()
        self.count("libvirt's revert")

    @precondition(has_snapshots)
    @rule(choice=choices)
    def delete_snapshot(self, choice: int) -> None:
        name = _pick(self._usable(), choice)
        if self.branches.snapshots[name].images == self.machine.images:
            self.branches.domain.delete_snapshot(name)
            del self.branches.snapshots[name]
        self.count("delete a snapshot")

    # --- life and death -----------------------------------------------------------------------

    @precondition(active)
    @rule()
    def stop(self) -> None:
        self.machine.stop()
        self.count("stop")

    @precondition(stopped)
    @rule()
    def start(self) -> None:
        self.branches.start()
        self.branches.find()
        self.count("start")

    @precondition(active)
    @rule()
    def kill(self) -> None:
        self.machine.kill()
        self.machine.start()
        self.branches.crashed()
        self.count("kill -9")

    # --- others' block jobs -------------------------------------------------------------------

    @precondition(active)
    @rule()
    def overlay(self) -> None:
        if len(block_jobs.below(self.machine, "vda")) < 3:
            block_jobs.overlay(self.machine)
            self.branches.find()
        self.count("external snapshot")

    @precondition(has_overlay)
    @rule()
    def commit(self) -> None:
        tops = dict(self.machine.images)
        for target in self.branches.targets:
            block_jobs.commit(self.machine, target)
        self.branches.find()
        self.branches.loose = True  # the base's bitmaps record what is copied
        for kept in self.branches.snapshots.values():
            kept.stale |= _stands_on(kept, tops)
        self.count("commit")

    # --- what must be true --------------------------------------------------------------------

    @precondition(begun)
    @rule(choice=choices)
    def look_closely(self, choice: int) -> None:
        """Of no step is it known which pairs it breaks; every now and then, all are looked at."""
        self.pick = choice
        if choice % 4 == 0:
            self.branches.check_all()
        self.count("look")

    @invariant()
    def no_byte_is_left_out(self) -> None:
        names = [] if self.over else list(self.branches.points)
        for turn in range(2 if names else 0):
            self.pick = (self.pick * 1103515245 + 12345 + turn) % (1 << 31)
            start = names[self.pick // 7 % len(names)]
            end = [None, *names][self.pick // 7919 % (len(names) + 1)]
            if start != end:
                self.branches.check(start, end)


def _stands_on(kept: Kept, images: dict[str, Path]) -> bool:
    """Whether a snapshot is in an image that was committed, and so stands on one that changed."""
    return any(kept.images[target] == image for target, image in images.items())


def _pick(names: list[str], choice: int) -> str:
    return names[choice % len(names)]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_random_histories(
    engine: str,
    stand: Stand,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if stand.kind == "debian11" and engine == "libvirt":
        pytest.skip("libvirt 7.0 has no checkpoints")
    given: Any = request.config.getoption("--hypothesis-seed")
    number = int.from_bytes(os.urandom(4), "big") if given is None else int(given)
    long = bool(request.config.getoption("--long"))
    run = Run(stand, engine, long=long)
    machine: Callable[[], RuleBasedStateMachine] = type("Histories", (Histories,), {"run": run})
    with capsys.disabled():
        print(f"\nhistories with engine {engine}: --hypothesis-seed {number}", flush=True)
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            seed(number)(machine),
            settings=settings(
                max_examples=LONG // STEPS * 2 if long else 50,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                # to find a smaller history than one that fails would take minutes
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        done = ", ".join(f"{count} {what}" for what, count in sorted(run.steps.items()))
        with capsys.disabled():
            print(f"{sum(run.steps.values())} steps: {done}", flush=True)
