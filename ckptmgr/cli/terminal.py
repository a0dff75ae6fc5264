"""What the place that text goes to can show."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO


class Style(StrEnum):
    """What a piece of text means; the value is its ANSI colour."""

    PLAIN = ""
    STRONG = "1"
    FAINT = "2"
    GOOD = "32"
    WARNING = "33"
    BAD = "1;31"


@dataclass(frozen=True)
class Terminal:
    """colour -- ANSI colours are understood; unicode -- line-drawing characters can be shown."""

    colour: bool = False
    unicode: bool = False

    def paint(self, text: str, style: Style) -> str:
        """`text` in `style`, where there are colours."""
        if not self.colour or not style or not text:
            return text
        return f"\x1b[{style.value}m{text}\x1b[0m"


PLAIN = Terminal()
"""A file or a pipe."""


def terminal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Terminal:
    """What `stream` can show; a file or pipe gets plain ASCII lines.

    NO_COLOR (https://no-color.org), when not empty, turns colours off.
    """
    if not stream.isatty():
        return PLAIN
    dumb = environment.get("TERM", "dumb") == "dumb"
    encoding = (stream.encoding or "").lower().replace("-", "")
    return Terminal(
        colour=not dumb and not environment.get("NO_COLOR"),
        unicode=not dumb and encoding == "utf8",
    )
