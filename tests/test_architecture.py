"""The package is as docs/architecture.md says: what there is, and which way its imports go."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr

PACKAGE = Path(ckptmgr.__file__).parent
DOCUMENT = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
FACE = {"__init__", "__main__", "_version"}


def rows(after: str) -> list[str]:
    """The names in the first column of the first table after a text."""
    table = DOCUMENT.split(after, 1)[1].split("|---|---|\n", 1)[1].split("\n\n", 1)[0]
    return [
        name for row in table.splitlines() for name in re.findall("`([^`]+)`", row.split("|")[1])
    ]


ROOMS = [name.removesuffix("/").removesuffix(".py") for name in rows("From the top down")]


def room(path: Path) -> str:
    """The module or folder of the package that a file is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The modules and folders of the package that a file imports from, wherever in it."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*here[: -node.level], *(node.module or "").split(".")]
                if node.level
                else ((node.module or "").split("."))
            )
            base = [part for part in base if part]
            names = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1)


def test_every_module_and_folder_is_in_the_table() -> None:
    there = {room(path) for path in PACKAGE.rglob("*.py") if room(path) not in FACE}
    assert sorted(ROOMS) == sorted(there)


@pytest.mark.parametrize("folder", ["operation", "backup"])
def test_the_tables_of_the_large_folders_name_what_is_there(folder: str) -> None:
    there = {path.stem for path in (PACKAGE / folder).glob("*.py")} - FACE
    named = rows(f"in `{folder}/`:")
    assert len(named) > 10
    assert set(named) <= there


def test_imports_only_go_down() -> None:
    level = {name: number for number, name in enumerate(ROOMS)}
    found = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        own = room(path)
        if own in FACE:
            continue
        for other in imported(path):
            if other in level and other != own:
                found += 1
                assert level[other] > level[own], f"{path} imports {other}"
    assert found > 300
