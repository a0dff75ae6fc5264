"""What a command answers, for people and for scripts, and how it is printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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


class OutputClosed(Exception):
    """Whoever read our standard output has gone; there is nobody to tell."""


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """Print `answer` on standard output.  Raises OutputClosed and OSError."""
    if as_json:
        print_document(answer.document())
    else:
        _write(f"{line}\n" for line in answer.text(terminal(sys.stdout)))


def print_document(document: Document) -> None:
    """Print one JSON document on standard output: a line, or indented on a terminal."""
    # Only UTF-8 can carry every character as it is; elsewhere they are escaped.
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    indent = 2 if sys.stdout.isatty() else None
    _write([json.dumps(document, indent=indent, ensure_ascii=encoding != "utf8"), "\n"])


def _write(pieces: Iterable[str]) -> None:
    try:
        sys.stdout.writelines(pieces)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error
    except OSError as error:
        error.filename = "standard output"
        # What is left in the buffer would fail once more, with another status, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
