"""Commands in a group: the program itself, and those with commands of their own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import click
from click.core import augment_usage_errors

from .failure import Usage
from .help import Helped
from .session import global_options

_ANYWHERE = global_options(hidden=True)


class Group(Helped, click.Group):
    """Commands in the order in which they were added; a wrong name gets a hint.

    meant -- other names, and the command that they mean here
    """

    meant: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; every usage error knows its command (click's parser forgets it for some)."""
        with augment_usage_errors(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; where there is none, say what it may be called here."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            path = ctx.command_path
            meant = self._meant(name)
            hint = f"did you mean '{path} {meant}'?" if meant else f"'{path} --help' lists them"
            raise Usage(f"there is no command {self.said(name)!r}", ctx, hint=hint)
        return super().resolve_command(ctx, args)

    def said(self, name: str) -> str:
        """The command as the user wrote it."""
        return name

    def _meant(self, name: str) -> str:
        meant = self.meant.get(name, name)
        if meant.split()[:1] in [[command] for command in self.commands]:
            return meant
        return next(iter(difflib.get_close_matches(name, self.commands, 1)), "")


class Subgroup(Group):
    """A group below the program; it takes the global options after its name too."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The group's own parameters, then the global options."""
        return [*super().get_params(ctx), *_ANYWHERE]

    def said(self, name: str) -> str:
        """The command as the user wrote it."""
        return f"{self.name} {name}"
