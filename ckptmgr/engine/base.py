"""What all engines have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..checkpoint import EngineName
from ..dirtymap import DirtyMap
from ..errors import CkptmgrError
from ..plan.steps import Server, Step

log = logging.getLogger("ckptmgr")


@dataclass
class Outcome:
    """What came out of a plan's steps.

    maps -- the dirty maps that were read, by disk target
    served -- where the data of disks can be read, by target: the server and the export's name
    """

    maps: dict[str, DirtyMap] = field(default_factory=dict)
    served: dict[str, tuple[Server, str]] = field(default_factory=dict)

    def add(self, disk: str, found: DirtyMap) -> None:
        """Take in a map of `disk`; a second one (of another layer) is joined to the first."""
        known = self.maps.get(disk)
        self.maps[disk] = found if known is None else known.union(found)


class Engine(Protocol):
    """Executes steps against one domain, in order; decides nothing.

    Raises a CkptmgrError at the first step that fails; the caller runs the plan's undo, or its
    release if the error is CheckpointExists.
    """

    name: EngineName

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Execute `steps` and return what they read."""
        ...


def run_steps(
    engine: EngineName, steps: Sequence[Step], perform: Callable[[Step, Outcome], None]
) -> Outcome:
    """Perform `steps` in order, timed and logged; an error gets the step as a note."""
    outcome = Outcome()
    for step in steps:
        log.debug("engine %s: %s", engine, step)
        start = time.monotonic()
        try:
            perform(step, outcome)
        except CkptmgrError as error:
            error.add_note(f"step: {step}")
            log.debug("engine %s: failed after %.3f s: %s", engine, time.monotonic() - start, error)
            raise
        log.debug("engine %s: done in %.3f s", engine, time.monotonic() - start)
    return outcome
