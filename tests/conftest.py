"""The unit tests need neither libvirt nor QEMU."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

# A shell has what it runs in the background ignore ^C, and so would the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def the_logger_as_it_was() -> Iterator[None]:
    """As a command that ran in a test's process has set it, no other would see messages."""
    logger = logging.getLogger("ckptmgr")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
