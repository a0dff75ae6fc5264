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
from collections.abc import Callable, Iterator
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
from ckptmgr.hook.installation import install, setting, uninstall
from integration import block_jobs
from integration.branch_model import GRANULARITY, Branches
from integration.stand import MIB, DiskSpec, Machine, Stand
from integration.test_hook import HOOKS, reload

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=6 * MIB))

STEPS = 25
"""Of one history."""

ROUND = 9
"""Histories of one run of hypothesis: of ten and more, it makes the first ones simple."""

SECONDS, ENOUGH = 25, 100
"""After that time and so many steps, a normal run begins no further history with an engine; in CI
after so many steps: what is run is the same there, however fast the machine is.
"""

LONG = 1500
"""Steps of a run with --long, with each engine."""

GUEST = ("write", "zero-write", "discard")
CHECKPOINTS = ("create", "delete", "archive", "repair")
SNAPSHOTS = ("snapshot", "revert", "libvirt's revert", "delete a snapshot")
LIFE = ("stop", "kill -9", "external snapshot", "commit")
OFTEN = ("write", "create", "snapshot", "revert") * 2 + ("write", "discard", "stop")
kinds = st.sampled_from([*GUEST, *CHECKPOINTS, *SNAPSHOTS, *LIFE, "look", *OFTEN])
disks = st.sampled_from([disk.target for disk in DISKS])
places = st.integers(0, 4 * MIB // GRANULARITY - 4)
shifts = st.sampled_from([0, 1, 512, 4096, GRANULARITY - 1])
lengths = st.sampled_from([1, 512, 4096, GRANULARITY, 3 * GRANULARITY - 2])
choices = st.integers(0, 1 << 16)


class Run:
    """All histories of one test.

    steps -- how many there were, by kind
    hooked -- libvirt has our hook
    """

    def __init__(self, stand: Stand, engine: str, *, long: bool) -> None:
        self.stand = stand
        self.hooked = stand.kind == "daemon" and os.geteuid() == 0
        self.engine = engine
        self.steps: dict[str, int] = {}
        self._long = long
        self._seconds = 0 if os.environ.get("CI") else SECONDS
        self._begun = time.monotonic()
        self._simplest = True
        self._failed = False

    def rounds(self) -> Iterator[int]:
        """The numbers of the rounds, as long as there is another one to be run."""
        for number in itertools.count():
            self._simplest = True
            yield number
            if not self.going_on():
                return

    def next(self) -> bool:
        """Whether there is another history to be run."""
        if self._failed:
            return True  # hypothesis runs it again, to print it
        if self._simplest:
            self._simplest = False
            return False  # hypothesis begins with the one that has the first kind in each step
        return self.going_on()

    def going_on(self) -> bool:
        """Whether there is time, or there are steps, left."""
        done = sum(self.steps.values())
        if self._long:
            return done < LONG
        return done < ENOUGH or time.monotonic() - self._begun < self._seconds

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
        if self.run.hooked:
            install(HOOKS, setting(Path(self.folder.name)))

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

    @precondition(lambda self: self.over)
    @rule()
    def rest(self) -> None:
        """There is nothing more to be done."""

    @initialize()
    def first(self) -> None:
        """No history begins without a checkpoint: that costs too many of the steps."""
        if not self.over:
            self.branches.scatter(0)
            self.branches.create("c0")

    # One rule: of several, hypothesis would leave out some from each history, and there are few.

    @precondition(begun)
    @rule(
        what=kinds,
        disk=disks,
        place=places,
        shift=shifts,
        length=lengths,
        whole=st.integers(1, 4),
        choice=choices,
        run=st.sampled_from([None, True, False]),
    )
    def step(
        self,
        what: str,
        disk: str,
        place: int,
        shift: int,
        length: int,
        whole: int,
        choice: int,
        run: bool | None,
    ) -> None:
        """Anything happens."""
        self.pick = choice
        if what in GUEST:
            self.guest(what, disk, place, shift, length, whole)
        elif what in CHECKPOINTS:
            self.checkpoint(what, choice)
        elif what in SNAPSHOTS:
            self.snapshot(what, choice, run)
        elif what in LIFE:
            self.life(what)
        else:
            self.branches.check_all()
            self.count("look at all")

    # --- the guest ----------------------------------------------------------------------------

    def guest(self, what: str, disk: str, place: int, shift: int, length: int, whole: int) -> None:
        """The guest changes something."""
        if what == "write":
            self.branches.write(disk, place * GRANULARITY + shift, length)
        elif what == "zero-write":
            self.branches.zero(disk, place * GRANULARITY, whole * GRANULARITY)
        else:
            self.branches.discard(disk, place * GRANULARITY, whole * GRANULARITY)
        self.count(what)

    # --- checkpoints --------------------------------------------------------------------------

    def checkpoint(self, what: str, choice: int) -> None:
        """Something is done about the checkpoints."""
        if what == "create" or not self.branches.points:
            self.branches.create(f"c{next(self.names)}")
            what = "create"
        elif what == "delete":
            self.delete(_pick(list(self.branches.points), choice))
        elif what == "archive":
            keep = 1 + choice % 3
            self.branches.domain.archive(keep=keep)
            self.branches.archived(keep)
        else:
            self.branches.domain.repair()
            left = [each for each in self.branches.domain.check() if not each.harmless]
            assert not left, [each.message for each in left]
        self.count(what)

    def delete(self, name: str) -> None:
        try:
            self.branches.domain.delete(name)
        except OperationFailed as error:
            # the bitmap that records, and no other could
            assert name == self.branches.at, error
            assert self.branches.points[name].parent not in self.branches.recording, error
        else:
            self.branches.deleted(name)

    # --- snapshots ----------------------------------------------------------------------------

    def snapshot(self, what: str, choice: int, run: bool | None) -> None:
        """Something is done about the snapshots."""
        usable = [name for name, kept in self.branches.snapshots.items() if not kept.stale]
        if what == "snapshot" or not usable:
            self.take(checkpoint=choice % 3 == 0, ours=choice % 2 == 0)
            return
        name = _pick(usable, choice)
        if what == "revert":
            moved = self.branches.snapshots[name].images != self.machine.images
            if moved and self.machine.active and self.run.stand.kind == "debian11":
                self.machine.stop()  # libvirt 7.0 would load it into the QEMU that runs
            self.branches.revert(name, run=run)
        elif what == "libvirt's revert":
            self.revert_behind_our_back(name)
        elif self.branches.snapshots[name].images == self.machine.images:
            self.branches.domain.delete_snapshot(name)
            del self.branches.snapshots[name]
        else:
            return
        self.count(what)

    def take(self, *, checkpoint: bool, ours: bool) -> None:
        """Take a snapshot, or have libvirt take one."""
        name = f"s{next(self.names)}"
        if not self.machine.active:
            # libvirt up to 9.0 refuses it where there are checkpoints
            with contextlib.suppress(OperationFailed, Unsupported):
                self.branches.snapshot(name)
            self.count("snapshot, stopped")
            return
        if ours:
            self.branches.snapshot(name, checkpoint=checkpoint)
        else:
            document = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
            self.machine.domain.snapshotCreateXML(document)
            self.branches.taken(name)
        self.count("snapshot")

    def revert_behind_our_back(self, name: str) -> None:
        domain, ran = self.machine.domain, self.machine.active
        try:
            domain.revertToSnapshot(domain.snapshotLookupByName(name), 0)
        except libvirt.libvirtError:
            # QEMU has died of it; to a state in which there was none libvirt starts none, and so
            # the hook sees the end of the one that ran alone
            assert not self.run.hooked or self.branches.snapshots[name].state == "stopped"
            self.branches.misled |= self.run.hooked and ran
        self.branches.misled &= not self.machine.active
        self.branches.others_reverted()

    # --- life and death, and others' block jobs -------------------------------------------------

    def life(self, what: str) -> None:
        """Something happens to the machine; one that is off is started."""
        if not self.machine.active:
            self.branches.start()
            self.branches.find()
            what = "start"
        elif what == "stop":
            self.machine.stop()
        elif what == "kill -9":
            self.machine.kill()
            self.branches.start()
            self.branches.crashed()
        elif what == "commit" and block_jobs.below(self.machine, "vda"):
            self.commit()
        elif len(block_jobs.below(self.machine, "vda")) < 3:
            block_jobs.overlay(self.machine)
            self.branches.find()
            what = "external snapshot"
        else:
            return
        self.count(what)

    def commit(self) -> None:
        for target in self.branches.targets:
            block_jobs.commit(self.machine, target)
        self.branches.find()
        self.branches.loose = True  # the base's bitmaps record what is copied
        for image in self.machine.images.values():
            self.branches.wrote_to(image)

    # --- what must be true --------------------------------------------------------------------

    @invariant()
    def no_byte_is_left_out(self) -> None:
        names = [] if self.over else list(self.branches.points)
        for turn in range(2 if names else 0):
            self.pick = (self.pick * 1103515245 + 12345 + turn) % (1 << 31)
            start = names[self.pick // 7 % len(names)]
            end = [None, *names][self.pick // 7919 % (len(names) + 1)]
            if start != end:
                self.branches.check(start, end)


def _pick(names: list[str], choice: int) -> str:
    return names[choice % len(names)]


CI_SEED = 20261125


@pytest.mark.thorough
@pytest.mark.timeout(7200)
@pytest.mark.releases(("debian11", "monitor"), ("debian13", "libvirt"), ("debian13", "monitor"))
def test_random_histories(
    engine: str,
    stand: Stand,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: Any = request.config.getoption("--hypothesis-seed")
    if given is None:
        # As for the unit tests: in CI the same examples in every run, elsewhere always others.
        given = CI_SEED if os.environ.get("CI") else int.from_bytes(os.urandom(4), "big")
    number = int(given)
    long = bool(request.config.getoption("--long"))
    run = Run(stand, engine, long=long)
    if run.hooked:
        install(HOOKS, setting(Path("/nowhere")))
        request.addfinalizer(lambda: uninstall(HOOKS))
        reload(request.getfixturevalue("daemon"))
    machine: Callable[[], RuleBasedStateMachine] = type("Histories", (Histories,), {"run": run})
    with capsys.disabled():
        print(f"\nhistories with engine {engine}: --hypothesis-seed {number}", flush=True)
    try:
        for turn in run.rounds():
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                seed(number + turn)(machine),
                settings=settings(
                    max_examples=ROUND,
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
