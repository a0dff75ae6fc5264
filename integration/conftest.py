"""Fixtures of the integration tests: private libvirts, and machines in them.

``embedded``   qemu:///embed in this process
``daemon``     a libvirtd of our own, which virsh and the command line reach as well
``local``      the embedded libvirt, or on the stacks each of them in turn
``stand``      the same, and the daemon in its run as well
``stack``      a libvirt and QEMU of another release, each in turn; ``stacks(name)`` gives one
``make_vm``    ``make_vm(disks, ...)`` -> Machine on the local stand; ended after the test
``make_vm_on`` ``make_vm_on(stand, disks, ...)``, the same on any stand

One process cannot have both an embedded libvirt and others, so there are several runs:

    pytest integration                   needs no stand, ``embedded``, ``local`` or ``stand``
    pytest integration --stand daemon    needs ``daemon`` or ``stand``
    pytest integration --stand stacks    needs ``stack``, ``stacks``, ``local`` or ``stand``
    pytest integration --stand debian11  the same, on that stack alone
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import libvirt
import pytest

from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.errors import Unsupported
from integration.stacks import RELEASES, Stack, table
from integration.stacks.fixtures import stack, stacks
from integration.stacks.repeats import Case, own_release, repeats
from integration.stacks.table import cell
from integration.stand import (
    Daemon,
    Embedded,
    Machine,
    Stand,
    StandError,
    Workspace,
    adopt,
    private_mounts,
    reap,
    scratch,
)

__all__ = ["cell", "stack", "stacks"]

MakeMachine = Callable[..., Machine]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stand",
        choices=["embedded", "daemon", "stacks", *RELEASES],
        default="embedded",
        help="which private libvirt the integration tests run on",
    )
    parser.addoption(
        "--quick", action="store_true", help="without the tests that are marked thorough"
    )
    parser.addoption(
        "--long",
        action="store_true",
        help="more cases, and thousands of random steps, not hundreds",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare this process while it has no threads yet."""
    # A shell has what it runs in the background ignore ^C, and so would the commands under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "once: not on the daemon, where it would run embedded as well"
    )
    config.addinivalue_line("markers", "scenario(name): the test's row in the table of the stacks")
    config.addinivalue_line(
        "markers", "together: one of several processes runs all of a module's tests on a stack"
    )
    config.addinivalue_line(
        "markers", "thorough(engine, ...): takes long; not with --quick, or with these engines not"
    )
    config.addinivalue_line("markers", "nested: also run in a host with nested KVM, on KVM")
    config.addinivalue_line(
        "markers",
        "releases((stack, engine), ...): these alone of the stacks; none: only with --long",
    )
    config.addinivalue_line("markers", "not_on_stacks(reason): on the embedded libvirt alone")
    config.addinivalue_line(
        "markers", "each_release: also on a release that repeats what other runs have"
    )
    if config.getoption("--stand") == "daemon" and os.geteuid() == 0:
        try:
            private_mounts()
        except StandError as reason:
            # in some containers; the tests themselves tell that they cannot run
            print(f"no private mounts: {reason}", file=sys.stderr)
    adopt()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this run's stand; see the module's docstring."""
    stand = config.getoption("--stand")
    long, quick = config.getoption("--long"), config.getoption("--quick")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        belongs = _belongs(item, stand) and (long or not _only_long(item, stand))
        (kept if belongs and not (quick and _thorough(item)) else dropped).append(item)
        table.mark(item, stand)
        if item.get_closest_marker("together") and config.getoption("dist", "no") != "no":
            stack = dict(item.user_properties)["stack"]
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {stack}"))
    if stand == "stacks" and not long:
        repeated = repeats(map(_case, kept), own_release())
        dropped += [item for item, again in zip(kept, repeated, strict=True) if again]
        kept = [item for item, again in zip(kept, repeated, strict=True) if not again]
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _case(item: pytest.Item) -> Case:
    said = dict(item.user_properties)
    marked = item.get_closest_marker("each_release") is not None
    return Case(str(said["scenario"]), str(said["engine"]), str(said["stack"]), marked)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On the stacks, ``stand`` and ``local`` are each of them in turn."""
    stand = metafunc.config.getoption("--stand")
    names = list(RELEASES) if stand == "stacks" else [stand]
    markers = [each.args for each in metafunc.definition.iter_markers("releases")]
    if markers and "engine" in metafunc.fixturenames:
        pairs = [pair for pair in next(filter(None, markers), ()) if pair[0] in names]
        if pairs and "stand" in metafunc.fixturenames:
            metafunc.parametrize(("stand", "engine"), pairs, indirect=True)
            return
        metafunc.parametrize("engine", ["libvirt", "monitor"], indirect=True)
    if names[0] in RELEASES:
        for fixture in sorted({"stand", "local"} & set(metafunc.fixturenames)):
            metafunc.parametrize(fixture, names, indirect=True)


def _belongs(item: pytest.Item, stand: str) -> bool:
    needs = set(getattr(item, "fixturenames", ()))
    if "other_host" in needs or "CKPTMGR_TEST_OTHER_HOST" in os.environ:
        return "other_host" in needs and "CKPTMGR_TEST_OTHER_HOST" in os.environ
    if "sample" in needs:
        return stand == "embedded" and "CKPTMGR_TEST_SAMPLE" in os.environ
    if needs & {"throw_away_user", "session"}:
        return stand == "daemon" and ("session" in needs) == (os.geteuid() != 0)
    if stand == "embedded":
        return not needs & {"daemon", "stacks"}
    if stand == "daemon":
        once = item.get_closest_marker("once") is not None
        return "daemon" in needs or ("stand" in needs and not once)
    if "embedded" in needs or item.get_closest_marker("not_on_stacks"):
        return False
    if stand == "stacks":
        return bool(needs & {"stacks", "stand", "local"})
    callspec = getattr(item, "callspec", None)
    return stand in needs or (callspec is not None and stand in callspec.params.values())


def _thorough(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    engine = None if callspec is None else callspec.params.get("engine")
    return any(not mark.args or engine in mark.args for mark in item.iter_markers("thorough"))


def _only_long(item: pytest.Item, stand: str) -> bool:
    marker = item.get_closest_marker("releases")
    return stand in ("stacks", *RELEASES) and marker is not None and not marker.args


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if hasattr(terminalreporter.config, "workerinput"):
        return  # one of several processes: its results are told by the one that began them
    _show_kills(terminalreporter)
    table.show(terminalreporter)


def _show_kills(reporter: pytest.TerminalReporter) -> None:
    """How often whom was killed, of the tests that enumerate where that can be."""
    found = [
        kill
        for report in reporter.getreports("passed")
        if report.when == "call"
        for name, kill in report.user_properties
        if name == "killed"
    ]
    if not found:
        return
    reporter.section("killed at every step")
    tried: Counter[str] = Counter()
    for what, who, points in found:
        reporter.write_line(f"{who} in {what}: {points} points")
        tried[who] += points
    counts = ", ".join(f"{who} {count} times" for who, count in tried.items())
    reporter.write_line(f"in all: {counts}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is about libvirt's own checkpoints cannot be run where it has none."""
    report = yield
    callspec = getattr(item, "callspec", None)
    if callspec is None or call.excinfo is None:
        return report
    stands = {callspec.params.get(name) for name in ("stand", "local")}
    refusal = isinstance(call.excinfo.value, (libvirt.libvirtError, Unsupported))
    said = str(call.excinfo.value) if refusal else ""
    why = next((words for words in table.NO_CHECKPOINTS if words in said), None)
    if "debian11" in stands and why is not None:
        report.outcome = "skipped"
        place, line, _ = item.location
        report.longrepr = (place, line or 0, f"Skipped: libvirt 7.0: {why}")
    return report


@pytest.fixture(scope="session")
def workspace() -> Iterator[Workspace]:
    """The folder of this run.  Fails at the end if a process of ours is left."""
    place = scratch()
    for each in {place, Path(tempfile.gettempdir())}:
        reap(each)
    with Workspace(place) as workspace:
        yield workspace
        left = workspace.running()
    assert not left, f"processes that the tests left behind (ended now): {left}"


@pytest.fixture
def tmp_path(workspace: Workspace) -> Iterator[Path]:
    """pytest's, but in the workspace: the stacks have it as well, at the same path."""
    path = workspace.folder("t")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def embedded(workspace: Workspace) -> Iterator[Embedded]:
    """The embedded libvirt of this process."""
    stand = Embedded(workspace)
    yield stand
    stand.close()


@pytest.fixture(scope="session")
def daemon(workspace: Workspace) -> Iterator[Daemon]:
    """A libvirtd of our own."""
    stand = Daemon(workspace)
    yield stand
    stand.close()


def _stand(request: pytest.FixtureRequest) -> Stand:
    name = getattr(request, "param", None) or request.config.getoption("--stand")
    if name in RELEASES:
        on_stack: Stack = request.getfixturevalue("stacks")(name)
        return on_stack
    found: Stand = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def stand(request: pytest.FixtureRequest) -> Stand:
    """The stand of this run."""
    return _stand(request)


@pytest.fixture(scope="session")
def local(request: pytest.FixtureRequest) -> Stand:
    """The embedded libvirt, or on the stacks each of them."""
    return _stand(request)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The engine, of tests with the marker ``releases``."""
    name: str = request.param
    return name


def with_setting(folder: Path) -> Callable[..., Path]:
    """``DomainAdapter.runtime_directory`` as with the setting ``socket_directory``."""
    original = DomainAdapter.runtime_directory

    def runtime_directory(adapter: DomainAdapter, override: Path | None = None) -> Path:
        return original(adapter, override or folder)

    return runtime_directory


@pytest.fixture(autouse=True)
def sockets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the setting ``socket_directory`` does for users of a libvirt in folders of its own."""
    for name in {"stand", "local"} & set(request.fixturenames):
        found = request.getfixturevalue(name)
        if isinstance(found, Stack):
            monkeypatch.setattr(DomainAdapter, "runtime_directory", with_setting(found.sockets))


@pytest.fixture
def make_vm_on() -> Iterator[MakeMachine]:
    """Machines on any stand: ``make_vm_on(stand, disks, ...)``, as ``Machine``."""
    with contextlib.ExitStack() as machines:

        def make(stand: Stand, *arguments: object, **options: object) -> Machine:
            machine = Machine(stand, *arguments, **options)  # type: ignore[arg-type]
            machines.callback(shutil.rmtree, machine.folder, ignore_errors=True)
            machines.callback(machine.destroy)
            return machine

        yield make


@pytest.fixture
def make_vm(local: Stand, make_vm_on: MakeMachine) -> MakeMachine:
    """Machines on the local stand: ``make_vm(disks, ...)``, as ``Machine``."""

    def make(*arguments: object, **options: object) -> Machine:
        return make_vm_on(local, *arguments, **options)

    return make
