"""A process that has imported everything: an operation costs a fork, not a new interpreter.

It has neither threads nor a connection, so that its children can have their own.  Run as
``python -m integration.kill``, it reads a line of JSON for each batch of tasks, runs them all at
once, a child each, and answers with a line for the batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from ckptmgr.checkpoint import EngineName
from ckptmgr.config import Settings
from ckptmgr.domain.connection import connect
from ckptmgr.errors import CkptmgrError
from ckptmgr.manager import Domain, Host
from ckptmgr.store import Store
from integration.stand import Workspace

from .boundaries import Boundaries, Victim


@dataclass(frozen=True)
class Task:
    """One operation in a process of its own.

    operation, arguments -- of ckptmgr's Domain
    rest -- further operations of the same process
    point -- of `Boundaries`; 0: nobody is killed
    pids -- of QEMU and libvirtd, as far as they are victims
    """

    uri: str
    store: str
    domain: str
    engine: str | None
    operation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rest: Sequence[tuple[str, Mapping[str, Any]]] = ()
    lock_timeout: float = 30.0
    victim: str = Victim.PROCESS
    point: int = 0
    pids: Mapping[str, int] = field(default_factory=dict)
    steps_only: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    status -- the process's exit status: that of the command line; negative: the signal
    struck -- the boundary at which the victim was killed, "" if nobody was to be
    error -- what was raised, by its code and message
    """

    status: int
    struck: str = ""
    error: str = ""


class Warm:
    """The process, from outside.  Use as a context manager.

    pids -- of all that there are
    """

    pids: ClassVar[set[int]] = set()

    def __init__(self, workspace: Workspace, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.kill"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workspace.record(self._process.pid)
        self.pids.add(self._process.pid)

    def run(self, task: Task) -> Outcome:
        """Run one task to its end, whichever that is."""
        return self.run_all([task])[0]

    def run_all(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run tasks at the same time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([asdict(task) for task in tasks]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm process has ended: {self._process.wait(5)}")
        return [Outcome(**each) for each in json.loads(answer)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)
        self.pids.discard(self._process.pid)


# --- inside ----------------------------------------------------------------------------------


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        tasks = [Task(**each) for each in json.loads(line)]
        started = [_start(task) for task in tasks]
        print(json.dumps([asdict(_finish(*each)) for each in started]), flush=True)


def _start(task: Task) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 70
    try:
        os.close(reader)
        status = _perform(task, writer)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def _finish(pid: int, reader: int) -> Outcome:
    with os.fdopen(reader) as report:
        said = dict(line.rstrip("\n").split(" ", 1) for line in report)
    _, status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(status), **said)


def _perform(task: Task, report: int) -> int:
    def say(what: str, text: str) -> None:
        os.write(report, f"{what} {' '.join(text.split())}\n".encode())

    boundaries = Boundaries(
        Victim(task.victim),
        task.point,
        task.pids,
        lambda name: say("struck", name),
        steps_only=task.steps_only,
    )
    try:
        with connect(task.uri) as connection:
            domain = _domain(
                task,
                Host(
                    connection,
                    Store(Path(task.store)),
                    Settings(lock_timeout=task.lock_timeout),
                    None if task.engine is None else EngineName(task.engine),
                ),
            )
            if task.point:
                boundaries.install()
            for operation, arguments in ((task.operation, task.arguments), *task.rest):
                getattr(domain, operation)(**arguments)
            boundaries.end()
    except CkptmgrError as error:
        say("error", f"{error.code}: {error}")
        return error.exit_status
    return 0


def _domain(task: Task, host: Host) -> Domain:
    return host.domain(task.domain)
