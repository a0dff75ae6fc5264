"""The unit tests need neither libvirt nor QEMU."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The CI machine is slow and shared: no deadline there, and the same examples in every run.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")

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
