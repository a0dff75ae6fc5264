"""What a piece of work costs: time, processor time and memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.01
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What one run of something took.

    seconds -- by the clock
    processor -- seconds of processor time: the commands, what they start, and the domain's QEMU
    memory -- MiB that the commands and what they start held at most; 0: none was run
    """

    seconds: float
    processor: float
    memory: float


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each; of the memory, the most."""
    return Cost(
        statistics.median(each.seconds for each in costs),
        statistics.median(each.processor for each in costs),
        max(each.memory for each in costs),
    )


class Meter:
    """A context manager that measures what is done in it.

    qemu -- process ids that work for it but are not started in it
    """

    cost: Cost

    def __init__(self, *qemu: int, environment: Mapping[str, str] | None = None) -> None:
        self._qemu = qemu
        self._environment = {**os.environ, **(environment or {}), "LC_ALL": "C.UTF-8"}
        # As what is installed, ours is compiled once.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._memory = 0.0

    def __enter__(self) -> Meter:
        self._processor = self._used()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._begun
        self.cost = Cost(seconds, self._used() - self._processor, self._memory)

    def run(self, *command: str | Path) -> None:
        """Run a command.  Raises CalledProcessError with what it said."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            with _watched(process.pid) as held:
                status = process.wait()
            self._memory = max(self._memory, *held)
            if status:
                said.seek(0)
                raise subprocess.CalledProcessError(status, command, said.read()[-2000:])

    def _used(self) -> float:
        used = sum(map(processor, self._qemu))
        for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(whose)
            used += usage.ru_utime + usage.ru_stime
        return used


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[list[float]]:
    """MiB that a process and its descendants hold, looked up again and again."""
    held = [0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_INTERVAL):
            held.append(sum(map(_memory, _family(pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _memory(pid: int) -> float:
    """What a process holds now, in MiB."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
