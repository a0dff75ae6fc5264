"""Standard output that cannot be written: told in one line, whatever was to be printed there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = [
    ("completion bash", 0),
    ("--json completion bash", 0),
    ("--json nothing", 2),
    ("--help", 0),
    ("list --help", 0),
    ("snapshot --help", 0),
    ("--version", 0),
    ("-v --version", 0),
]
"""What each prints on standard output, and its status where it can."""

SIGPIPE = 128 + 13


def run(command: str, streams: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours with its streams led where the shell is told to."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m ckptmgr {command} {streams}', sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("command", "status"), COMMANDS)
def test_output_that_cannot_be_written_is_told_in_one_line(command: str, status: int) -> None:
    done = run(command, ">/dev/full")
    assert done.stderr == "ckptmgr: error: writing the output failed: No space left on device\n"
    assert done.returncode == (status or 1)


@pytest.mark.parametrize(("command", "status"), COMMANDS)
def test_a_reader_that_goes_away_is_told_nothing(command: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before it begins, or it might have written all
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ckptmgr", *command.split()],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == (status or SIGPIPE)


@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">/dev/full 2>&-"])
def test_the_status_tells_where_nothing_else_can(streams: str) -> None:
    assert run("completion bash", streams).returncode == 1
    assert run("--json nothing", streams).returncode == 2


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_closed_streams_are_left_alone(streams: str) -> None:
    done = run("list --help", streams)
    assert (done.returncode, done.stderr) == (0, "")
    assert run("--json nothing", streams).returncode == 2
