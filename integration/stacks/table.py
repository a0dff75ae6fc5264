"""The table of a run: scenario and engine, and how it went on each stack.

A test's scenario is its marker ``scenario("...")``, or else its module, and the folder that this
is in.  Its stack and engine are its parameters (``stack`` or ``stand``; ``engine`` and what is
named so in the modules), or what it says through the fixture ``cell``; else the stack is the run's
stand.

The embedded libvirt, the daemon and the stacks each need a run of their own.  Runs with
``CKPTMGR_TEST_CELLS`` in their environment add a line for each test to that file, and

    python -m integration.stacks.table FILE

prints the one table of all of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from ckptmgr.checkpoint import EngineName

from .build import RELEASES

NO_CHECKPOINTS = (
    "incremental backup is not supported yet",
    "libvirt does not support checkpoints with this domain's QEMU",
)
"""What libvirt 7.0 and ckptmgr answer where a domain has not been given the capability."""

CELLS = "CKPTMGR_TEST_CELLS"
STACKS = ("embedded", "daemon", *RELEASES)
KVM = "kvm"
"""The column of what ran in a host with nested KVM: ``kvm embedded``, ``kvm daemon``."""
BETWEEN = "between two"
_ENGINES = ("auto", *EngineName, "any")
_STATES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


@dataclass(frozen=True)
class Result:
    """How one test went.

    stack -- one of STACKS, or KVM, perhaps with more ("debian11 -drive", "debian12 to debian13")
    word -- passed, refused, skipped, failed, ...
    why -- of what is refused or skipped
    """

    scenario: str
    stack: str
    engine: str
    word: str
    why: str | None = None


class Cell:
    """What a test adds to its own result."""

    def __init__(self, item: pytest.Item) -> None:
        self._properties = item.user_properties

    def of(self, *, stack: str | None = None, engine: str | None = None) -> None:
        """Name the row and column, where they are no parameters of the test."""
        given = {"stack": stack, "engine": engine}
        # plain strings can be handed on from one process of a run to another
        self._properties += [(name, str(value)) for name, value in given.items() if value]

    def chose(self, engine: str) -> None:
        """Say which engine was chosen by ckptmgr."""
        self._properties += [("engine", "auto"), ("chose", str(engine))]

    def refused(self, message: str) -> None:
        """Say that all is refused here, properly, and with which message."""
        self._properties.append(("refused", str(message)))


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    """The test's cell in the table."""
    return Cell(request.node)


def mark(item: pytest.Item, stand: str) -> None:
    """Note on a test what its report has to say for the table."""
    marker = item.get_closest_marker("scenario")
    callspec = getattr(item, "callspec", None)
    parameters: Mapping[str, object] = {} if callspec is None else callspec.params
    stack = next((str(value) for value in parameters.values() if value in RELEASES), stand)
    words = item.path.stem.removeprefix("test_").replace("_", " ")
    if item.path.parent.name != "integration":
        words = f"{item.path.parent.name}, {words}"
    scenario = words if marker is None else marker.args[0]
    engine = next((str(value) for value in parameters.values() if value in [*EngineName]), "any")
    if parameters.get("engine") == "auto":
        engine = "auto"
    item.user_properties += [("scenario", scenario), ("engine", engine), ("stack", stack)]


def results(reports: Mapping[str, Iterable[pytest.TestReport]]) -> Iterator[Result]:
    """The results of a run, from its reports by state."""
    found = [(state, report) for state in _STATES for report in reports.get(state, ())]
    for state, report in found:
        said = {name: str(value) for name, value in getattr(report, "user_properties", ())}
        if "scenario" not in said:
            continue
        word, why = state, said.get("refused")
        if state == "skipped" and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        if state == "skipped":
            refusal = any(words in str(why) for words in NO_CHECKPOINTS)
            word = "refused" if refusal else "skipped"
        elif state == "passed" and why is not None:
            word = "refused"
        elif "chose" in said:
            word = f"{state} ({said['chose']})"
        yield Result(said["scenario"], said["stack"], said["engine"], word, why)


def lines(results: Iterable[Result]) -> list[str]:
    """The table, its heading first, and then a line for each refusal."""
    rows: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    reasons: dict[str, None] = {}
    for result in results:
        column, word = _place(result)
        row = rows.setdefault((result.scenario, result.engine), {})
        row.setdefault(column, Counter())[word] += 1
        if result.why is not None and result.word in ("refused", "skipped"):
            reasons[f"{result.word} on {result.stack}: {result.why}"] = None
    used = {column for row in rows.values() for column in row}
    columns = [column for column in (*STACKS, KVM, BETWEEN) if column in used]
    scenarios = list(dict.fromkeys(scenario for scenario, _ in rows))
    ordered = sorted(rows, key=lambda key: (scenarios.index(key[0]), _ENGINES.index(key[1])))
    cells = [("scenario", "engine", *columns)]
    cells += [(*key, *(_text(rows[key].get(column)) for column in columns)) for key in ordered]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return [*padded, *reasons]


def _place(result: Result) -> tuple[str, str]:
    """The column, and the word in it."""
    name, _, more = result.stack.partition(" ")
    if more.startswith("to "):
        return BETWEEN, f"{result.stack.replace('debian', '')} {result.word}"
    return name, f"{more} {result.word}".strip()


def _text(counted: Counter[str] | None) -> str:
    if counted is None:
        return "-"
    bad = ("failed", "error")
    words = (
        f"{number} {word}" if any(each in word for each in bad) else word
        for word, number in sorted(counted.items())
    )
    return ", ".join(words)


def show(reporter: pytest.TerminalReporter) -> None:
    """Print the table of this run, or keep it for the one of several runs."""
    states = {state: reporter.getreports(state) for state in _STATES}
    found = list(results(states))
    kept = os.environ.get(CELLS)
    if kept:
        add(Path(kept), found)
    elif any(result.stack not in ("embedded", "daemon") for result in found):
        reporter.section("stacks")
        for line in lines(found):
            reporter.write_line(line)


def read(file: Path) -> list[Result]:
    """The results that runs have added to a file."""
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def add(file: Path, found: Iterable[Result]) -> None:
    """Add results to a file."""
    with file.open("a") as kept:
        kept.writelines(json.dumps(asdict(result)) + "\n" for result in found)


def main(arguments: Sequence[str]) -> None:
    """Print the table of the runs whose results are in a file."""
    (file,) = arguments
    for line in lines(read(Path(file))):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
