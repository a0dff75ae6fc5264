"""docs/cli.md says what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from ckptmgr import errors
from ckptmgr.cli import main
from ckptmgr.cli.program import program

from .cli_host import Host, host_fixture
from .repositories import filled
from .restorable import restorable

__all__ = ["host_fixture"]

TEXT = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- document: ([^\n]*) -->\n```json\n(.*?)```", TEXT, re.DOTALL)


def leaves() -> dict[str, click.Command]:
    """Every command by the words that it is called by."""
    found: dict[str, click.Command] = {}
    for name, command in program.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name} {below}": each for below, each in command.commands.items()}
        else:
            found[name] = command
    return found


COMMANDS = leaves()


def words(command: str) -> str:
    """The command in a command line."""
    first, second = [*command.split(), ""][:2]
    return first if first in COMMANDS else f"{first} {second}"


def section(heading: str) -> str:
    """The text from a heading to the next one."""
    found = re.search(rf"^##+ {re.escape(heading)}\b.*?(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"no section {heading}"
    return found.group()


def shape(value: Any) -> Any:
    """Keys, in their order, and nothing of the values; that of a list is its first entry's."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [shape(value[0])]
    return None


@pytest.mark.parametrize(("command", "text"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_documents_have_the_documented_fields(
    command: str, text: str, host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    documented = json.loads(text)
    if command.startswith("restore"):
        restorable(tmp_path / "backup")
        command = command.replace("/srv", str(tmp_path))
    elif "/srv/backup" in command:
        filled(tmp_path / "backup", "monday")  # (merging images takes QEMU)
        command = command.replace("/srv", str(tmp_path))
    if command.startswith("hook"):
        (tmp_path / "qemu").touch(mode=0o755)
        command += f" --directory {tmp_path}"
        if "uninstall" in command or "status" in command:
            main(["hook", "install", "--directory", str(tmp_path)])
            capsys.readouterr()
    main([*command.split(), "--json"])
    printed = json.loads(capsys.readouterr().out)
    for part in (documented, printed):
        if part.get("checkpoints"):
            part["checkpoints"] = []
    assert shape(documented) == shape(printed)


def test_every_command_prints_a_documented_document() -> None:
    documented = {words(command) for command, _ in EXAMPLES}
    like_show = {"create", "show", "current", "parent", "redefine", "snapshot revert"}
    assert documented | like_show == set(COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_and_option_is_documented(name: str) -> None:
    text = section(name)
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}" in text
        elif parameter.metavar is not None:
            assert parameter.metavar in text.splitlines()[0]


def test_no_option_is_documented_that_is_not_there() -> None:
    for name, command in COMMANDS.items():
        known = {opt for parameter in command.params for opt in parameter.opts}
        listed = set(re.findall(r"^\| `(--[a-z-]+)", section(name), re.MULTILINE))
        assert listed <= known, name


def test_global_options_are_documented() -> None:
    text = section("Options of every command")
    for parameter in program.params:
        for option in parameter.opts:
            assert not option.startswith("-") or f"`{option}" in text, option


def test_every_error_code_is_documented_with_its_status() -> None:
    table = dict(re.findall(r"^\| `([a-z-]+)` \| (\d) \|", section("Errors"), re.MULTILINE))
    codes = {
        value.code: str(value.exit_status)
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.CkptmgrError)
    }
    assert table == codes | {"usage": "2"}
    statuses = set(re.findall(r"^\| (\d) \|", section("Exit status"), re.MULTILINE))
    assert set(table.values()) | {"0", "4"} == statuses
