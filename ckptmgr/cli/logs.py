"""What the library logs, shown on standard error."""

from __future__ import annotations

import logging
import sys

from .terminal import Style, terminal
from .text import visible_lines

_STYLES = {logging.WARNING: Style.WARNING, logging.ERROR: Style.BAD, logging.CRITICAL: Style.BAD}


class _Lines(logging.Formatter):
    """``ckptmgr: warning: message``, harmless on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower() + ":"
        style = _STYLES.get(record.levelno, Style.FAINT)
        first, *rest = visible_lines(super().format(record))
        head = f"ckptmgr: {terminal(sys.stderr).paint(level, style)} {first}"
        return "\n".join([head, *(f"  {line}" for line in rest)])


def log_to_stderr(verbosity: int) -> None:
    """Show what the logger "ckptmgr" is told.

    verbosity -- below 0: errors, 0: and warnings, 1: and information, above: everything
    """
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("ckptmgr")
    logger.handlers[:] = [handler]
    logger.setLevel(levels[max(-1, min(verbosity, 2))])
    logger.propagate = False
