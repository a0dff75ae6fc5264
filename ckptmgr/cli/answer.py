"""What a command answers, for people and for scripts, and how it is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .output import write
from .terminal import Terminal, terminal

Document = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a command found or did; made after everything is closed, printed once.

    document -- makes the JSON document for ``--json``
    text -- makes the lines for people
    status -- the exit status
    """

    document: Callable[[], Document]
    text: Callable[[Terminal], Iterable[str]]
    status: int = 0


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """Print `answer` on standard output.  Raises OutputLost."""
    if as_json:
        print_document(answer.document())
    else:
        write(f"{line}\n" for line in answer.text(terminal(sys.stdout)))


def print_document(document: Document) -> None:
    """Print one JSON document on standard output: a line, or indented on a terminal.

    Raises OutputLost.
    """
    # Only UTF-8 can carry every character as it is; elsewhere they are escaped.
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    indent = 2 if sys.stdout.isatty() else None
    write([json.dumps(document, indent=indent, ensure_ascii=encoding != "utf8"), "\n"])
