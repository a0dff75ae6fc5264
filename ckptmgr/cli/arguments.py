"""The arguments and options that commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .candidates import complete_checkpoint, complete_domain, complete_snapshot

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


def dry_run_option(function: Decorated) -> Decorated:
    """``--dry-run``, which every change command has."""
    return click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")(function)
