"""Exit statuses, errors and the global options, as promised to scripts."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr import errors
from ckptmgr.cli import main
from ckptmgr.cli.failure import Interrupted, failure

from .cli_host import Host, host_fixture
from .speed import slowness

__all__ = ["host_fixture"]

Output = pytest.CaptureFixture[str]


def run_json(capsys: Output, *arguments: str) -> tuple[int, Any]:
    status = main(list(arguments))
    return status, json.loads(capsys.readouterr().out)


USAGE = [
    [],
    ["list"],
    ["--bogus"],
    ["lst", "web"],
    ["list", "web", "extra"],
    ["list", "web", "--bogus"],
    ["list", "web", "--descendants"],
    ["list", "web", "--tree", "--name"],
    ["list", "web", "--tree", "--roots"],
    ["list", "web", "--roots", "--from", "c1"],
    ["list", "web", "--leaves", "--no-leaves"],
    ["list", "web", "--from"],
    ["--engine", "magic", "list", "web"],
    ["show", "web"],
    ["delete", "web", "c1", "--children", "--children-only"],
    ["show", "web", "\udcff"],
    ["completion", "tcsh"],
    ["--store", "", "list", "web"],
    ["points", ""],
    ["backup", "web", ""],
    ["restore", "repo", "web", "p1", ""],
    ["redefine", "web", ""],
    ["hook", "install", "--directory", ""],
    ["hook", "install", "--python", ""],
]


def test_a_folder_that_must_not_be_read_is_no_usage_error(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who look find out: root, as in most of these tests, may read anything."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert main(["points", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage_errors_are_status_2_on_standard_error(
    arguments: list[str], host: Host, capsys: Output
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines[0].startswith("ckptmgr: error: ")
    assert lines[1].startswith("usage: ckptmgr")
    assert lines[2].startswith("hint: ")
    assert host.sessions == []  # nothing was connected to


# ("--from --json" has the value "--json")
JSON_FIRST = [["--json", *arguments] for arguments in USAGE]
JSON_LAST = [[*arguments, "--json"] for arguments in USAGE if arguments[-1:] != ["--from"]]


@pytest.mark.parametrize("words", JSON_FIRST + JSON_LAST, ids=" ".join)
def test_usage_errors_with_json_are_one_document(
    words: list[str], host: Host, capsys: Output
) -> None:
    status, document = run_json(capsys, *words)
    assert status == 2
    assert set(document) == {"error"}
    assert set(document["error"]) == {"code", "message", "hint"}
    assert document["error"]["code"] == "usage"


def test_json_behind_two_dashes_is_an_argument(capsys: Output) -> None:
    assert main(["list", "--", "web", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [["create", "web", "--disk", "vda=maybe"], ["create", "web", ".hidden"], ["create", "web", ""]],
    ids=" ".join,
)
def test_requests_that_cannot_be_are_refused_before_connecting(
    arguments: list[str], host: Host, capsys: Output
) -> None:
    status, document = run_json(capsys, "--json", *arguments)
    assert (status, document["error"]["code"]) == (2, "invalid-request")
    assert document["error"]["hint"]
    assert host.sessions == []


@pytest.mark.parametrize(
    ("virsh", "ours"),
    [
        ("checkpoint-list", "ckptmgr list"),
        ("checkpoint-dumpxml", "ckptmgr show --xml"),
        ("checkpoint-create-as", "ckptmgr create"),
        ("delet", "ckptmgr delete"),
        ("frobnicate", "--help"),
    ],
)
def test_users_of_virsh_are_told_the_command(virsh: str, ours: str, capsys: Output) -> None:
    assert main([virsh, "web"]) == 2
    assert ours in capsys.readouterr().err.splitlines()[-1]


CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.CkptmgrError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_every_error_has_its_status_and_code(
    kind: type[errors.CkptmgrError], host: Host, capsys: Output
) -> None:
    host.only.fails = kind("no luck", hint="try again")
    status, document = run_json(capsys, "--json", "diff", "web", "c0")
    assert status == kind.exit_status
    assert document == {"error": {"code": kind.code, "message": "no luck", "hint": "try again"}}
    assert host.closed == 1

    assert main(["diff", "web", "c0"]) == kind.exit_status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "ckptmgr: error: no luck\nhint: try again\n"


def test_statuses_promised() -> None:
    statuses = {kind.code: kind.exit_status for kind in CLASSES}
    assert statuses["no-domain"] == statuses["no-checkpoint"] == 3
    assert statuses["busy"] == 5
    assert statuses["unsupported"] == statuses["node-unknown"] == 6
    assert statuses["failed"] == statuses["connection"] == 1


def test_errors_cannot_draw_on_the_terminal(host: Host, capsys: Output) -> None:
    host.fails = errors.OperationFailed("qemu says\n\x1b[2J[red]", hint="\x07")
    assert main(["list", "web"]) == 1
    assert capsys.readouterr().err == ("ckptmgr: error: qemu says\n  \\x1b[2J[red]\nhint: \\x07\n")


def test_an_unexpected_error_of_the_system_is_status_1(host: Host, capsys: Output) -> None:
    host.only.fails = PermissionError(13, "Permission denied", "/var/lib/ckptmgr")
    status, document = run_json(capsys, "--json", "diff", "web", "c0")
    assert status == 1
    assert document["error"]["code"] == "failed"
    assert document["error"]["message"] == "/var/lib/ckptmgr: Permission denied"


def test_a_missing_module_is_told_without_a_traceback(host: Host, capsys: Output) -> None:
    host.only.fails = ModuleNotFoundError("No module named 'nbd'", name="nbd")
    assert main(["diff", "web", "c0"]) == 1
    assert "'nbd' is not installed" in capsys.readouterr().err


@pytest.fixture
def hangups() -> Iterator[None]:
    """As on a terminal: `nohup` has what it runs ignore them, and so do we."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
def test_a_signal_closes_the_connection_and_is_told(host: Host, capsys: Output) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        host.closed = 0
        host.only.signal = number
        assert main(["--json", "diff", "web", "c0"]) == status
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "interrupted"
        assert host.closed == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupts_have_the_shell_s_statuses() -> None:
    assert failure(KeyboardInterrupt()).status == 130
    assert failure(Interrupted(signal.SIGTERM)).message == "interrupted by SIGTERM"


@pytest.mark.parametrize("before", [True, False])
def test_global_options_are_taken_before_and_after_the_command(
    before: bool, host: Host, tmp_path: Path, capsys: Output
) -> None:
    options = ["-c", "qemu:///session", "--store", str(tmp_path), "--engine", "monitor", "-r"]
    options += ["--json", "-v"]
    command = ["list", "web"]
    status, _ = run_json(capsys, *(options + command if before else command + options))
    assert status == 0
    (session,) = host.sessions
    assert session.connect == "qemu:///session"
    assert session.store == tmp_path
    assert session.engine == "monitor"
    assert session.read_only
    assert session.json
    assert session.verbosity == 1


def test_without_options_nothing_is_asked_for(host: Host, capsys: Output) -> None:
    assert main(["list", "web"]) == 0
    (session,) = host.sessions
    assert (session.connect, session.store, session.engine) == (None, None, "auto")
    assert not session.read_only


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], True), (["-v"], True), (["-q"], False), (["-q", "-v"], True), (["-qq"], False)],
    ids=str,
)
def test_warnings_are_shown_unless_quiet(
    options: list[str], expected: bool, host: Host, capsys: Output
) -> None:
    assert main(["create", "web", "c9", *options]) == 0
    output = capsys.readouterr()
    assert output.out == "c9\n"
    warning = "ckptmgr: warning: vdb is left out: raw \\x1b[31m\n"
    assert output.err == (warning if expected else "")


# --- as a process --------------------------------------------------------------------------


def run_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptmgr", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_version_is_told_at_once_and_without_a_parser() -> None:
    code = "import sys; from ckptmgr.cli import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    version, modules = done.stdout.splitlines()
    assert version.startswith("ckptmgr ")
    heavy = {"click", "rich", "lxml", "libvirt", "nbd", "pyroaring", "logging"}
    assert not heavy & set(modules.split())


def test_help_needs_neither_libvirt_nor_lxml() -> None:
    code = (
        "import sys; from ckptmgr.cli import main; main(['list', '--help']);"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stdout.splitlines()[-1].split())
    assert not {"rich", "lxml", "libvirt", "nbd", "pyroaring"} & modules


def test_version_takes_less_than_150_ms_of_processor_time() -> None:
    """The clock on the wall would tell as well what else the machine does."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(8):
        start = spent()
        assert run_process("--version").returncode == 0
        times.append((spent() - start) / slowness())
    assert min(times) < 0.15


def test_version_with_other_options_is_told_too() -> None:
    done = run_process("--json", "--version")
    assert done.stdout.startswith("ckptmgr ")
    assert done.returncode == 0


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_no_file_takes_the_place_of_a_closed_standard_stream(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    """Or what is printed there would be written into that file."""
    code = (
        "import os, sys; from ckptmgr.cli import main\n"
        "status = 0 if main() in (0, 1) else 9\n"
        f"opened = os.open({str(tmp_path / 'file')!r}, os.O_CREAT)\n"
        "sys.exit(status if opened > 2 else 8)"
    )
    streams = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" redefine x - {streams}', sys.executable, code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_names_that_the_encoding_lacks_do_not_fail_to_print() -> None:
    done = run_process("list", "東京", "x", env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_json_is_ascii_where_the_output_is_not_utf_8(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.fails = errors.NoDomain("there is no domain '東京 😀'")
    for encoding, escaped in (("latin-1", True), ("utf-8", False)):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert main(["--json", "list", "web"]) == 3
        text = raw.getvalue().decode(encoding)
        assert json.loads(text)["error"]["message"] == "there is no domain '東京 😀'"
        assert text.isascii() == escaped
