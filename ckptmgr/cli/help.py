"""``--help`` and ``--version``: written as an answer is, so that a failure is told as its is."""

from __future__ import annotations

from collections.abc import Callable

import click

from .._version import __version__
from .output import write


class Helped(click.Command):
    """A command whose help is written by `write`."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """The option of the help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _says(lambda context: context.get_help())
        return option


def version_option() -> click.Option:
    """The option ``--version``."""
    return click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_says(lambda context: f"{context.find_root().info_name} {__version__}"),
        help="Show the version and exit.",
    )


def _says(text: Callable[[click.Context], str]) -> Callable[..., None]:
    """A callback of a flag that is given to read `text` and no more."""

    def say(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            write([text(context), "\n"])
            context.exit()

    return say
