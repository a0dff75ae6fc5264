"""The arguments and options that commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .candidates import (
    complete_checkpoint,
    complete_domain,
    complete_kept_domain,
    complete_point,
    complete_snapshot,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def text(value: str) -> str:
    """An argument that can be written to libvirt and into a document.

    Python keeps bytes that are not UTF-8 as surrogates, which neither takes.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it is not UTF-8 text") from None
    return value


class FilePath(click.Path):
    """A path.  An empty one, as of a variable that is not set, is not the working folder."""

    def __init__(self, *, file_okay: bool = True, allow_dash: bool = False) -> None:
        # Whether it can be read is found, and told, by what reads it.
        super().__init__(file_okay=file_okay, allow_dash=allow_dash, path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; see click.Path."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


def domain_argument(function: Decorated) -> Decorated:
    """``DOMAIN``: a name, UUID or id."""
    return click.argument("domain", type=text, shell_complete=complete_domain)(function)


def checkpoint_argument(
    name: str, *, metavar: str = "C", required: bool = True
) -> Callable[[Decorated], Decorated]:
    """A checkpoint's name."""
    return click.argument(
        name, metavar=metavar, type=text, required=required, shell_complete=complete_checkpoint
    )


def snapshot_argument(function: Decorated) -> Decorated:
    """``NAME``: a snapshot's."""
    return click.argument("name", metavar="NAME", type=text, shell_complete=complete_snapshot)(
        function
    )


def repository_argument(function: Decorated) -> Decorated:
    """``REPO``: the folder of a repository."""
    return click.argument("repository", metavar="REPO", type=FilePath(file_okay=False))(function)


def kept_domain_argument(*, required: bool) -> Callable[[Decorated], Decorated]:
    """``DOMAIN``: the name or UUID of a domain of which the repository has points."""
    return click.argument(
        "domain",
        metavar="DOMAIN" if required else "[DOMAIN]",
        type=text,
        required=required,
        shell_complete=complete_kept_domain,
    )


def point_argument(*, required: bool) -> Callable[[Decorated], Decorated]:
    """``POINT``: the name of a restore point."""
    return click.argument(
        "point",
        metavar="POINT" if required else "[POINT]",
        type=text,
        required=required,
        shell_complete=complete_point,
    )


def dry_run_option(function: Decorated) -> Decorated:
    """``--dry-run``, which every change command has."""
    return click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")(function)
