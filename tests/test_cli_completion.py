"""Completion: what is offered, safely, and never an error on the line that is being edited."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.cli import main
from ckptmgr.cli.completion import VARIABLE
from ckptmgr.cli.program import program

ROOT = Path(__file__).parent.parent


def ask(
    variables: dict[str, str], module: str = "tests.cli_host"
) -> subprocess.CompletedProcess[str]:
    """What the program answers to a shell's script."""
    return subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def bash(line: str, current: str | None = None, **options: Any) -> list[str]:
    """Candidates for the line up to the cursor; `current`: the word as readline splits it."""
    words = {
        VARIABLE: "bash_complete",
        "COMP_LINE": line,
        "COMP_CURRENT": line.rpartition(" ")[2] if current is None else current,
    }
    done = ask(words, **options)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "current", "offered"),
    [
        ("ckptmgr di", None, ["diff"]),
        ("ckptmgr show ", None, ["web", "my vm", "a,b", "$(reboot)"]),
        ("ckptmgr show 'my v", "'my v", ["my vm"]),
        ("ckptmgr show web c", None, ["c0", "c1", "c2", "c3", "c4"]),
        ("ckptmgr -c qemu:///system show web c4", None, ["c4"]),
        ("ckptmgr diff web c0 c1", None, ["c1"]),
        ("ckptmgr list web --from c1", None, ["c1"]),
        ("ckptmgr create web --disk vda=", "=", ["no"]),
        ("ckptmgr create web --disk vdb", None, ["vdb", "vdb=no"]),
        ("ckptmgr backup web /r --disk vdb", None, ["vdb"]),
        ("ckptmgr -c qemu:///se", "///se", ["///session"]),
        ("ckptmgr --engine off", None, ["offline"]),
        ("ckptmgr list web --desc", None, ["--descendants"]),
        ("ckptmgr show nope c", None, []),
        ("ckptmgr show \\", None, ["web", "my vm", "a,b", "$(reboot)"]),
        ("ckptmgr nonsense ", None, []),
    ],
)
def test_bash_is_offered(line: str, current: str | None, offered: list[str]) -> None:
    found = bash(line, current)
    if line == "ckptmgr nonsense ":
        assert "list" in found  # the commands that there are
    else:
        assert found == offered


def test_zsh_and_fish_are_offered_names_whole() -> None:
    words = {"COMP_WORDS": "ckptmgr show ", "COMP_CWORD": "2"}
    done = ask(words | {VARIABLE: "zsh_complete"})
    assert done.stdout.splitlines()[1::3] == ["web", "my vm", "a,b", "$(reboot)"]
    done = ask(words | {"COMP_CWORD": "", VARIABLE: "fish_complete"})
    assert done.stdout.splitlines() == ["plain,web", "plain,my vm", "plain,a,b", "plain,$(reboot)"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_hypervisor_that_cannot_be_reached_offers_nothing_and_says_nothing(shell: str) -> None:
    words = "ckptmgr -c qemu+unix:///system?socket=/nonexistent show "
    variables = {"COMP_LINE": words, "COMP_WORDS": words, "COMP_CWORD": "4"}
    done = ask(variables | {VARIABLE: f"{shell}_complete"}, module="ckptmgr")
    assert done.stdout.strip() == ""
    assert done.stderr == ""


@pytest.mark.parametrize("instruction", ["bash_complete", "tcsh_complete", "bash_source", "x"])
def test_a_broken_script_is_answered_with_nothing(instruction: str) -> None:
    done = ask({VARIABLE: instruction}, module="ckptmgr")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_ones_that_the_shell_understands(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert VARIABLE in script.read_text()
    program = shutil.which(shell)
    if program is not None:  # those that are not installed are only printed
        subprocess.run([program, "-n", str(script)], check=True, timeout=60)


def test_bash_takes_candidates_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    command = tmp_path / "ckptmgr"
    command.write_text(
        f"#!/bin/sh\ncd {shlex.quote(str(ROOT))} && "
        f"exec {shlex.quote(sys.executable)} -m tests.cli_host\n"
    )
    command.chmod(0o755)
    line = "ckptmgr show "
    script += (
        "compopt() { :; }\n"  # only works while readline completes
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=(ckptmgr show '')\n"
        f"COMP_CWORD=2\n_ckptmgr_completion {shlex.quote(str(command))}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["web", "my vm", "a,b", "$(reboot)"]
    assert done.stderr == ""


def test_every_command_has_a_help_line_that_is_not_cut() -> None:
    from click import Context

    lines = program.get_help(Context(program, info_name="ckptmgr")).splitlines()
    assert set(program.commands) <= {line.split()[0] for line in lines if line.strip()}
    assert not [line for line in lines if line.endswith("...")]
