"""Fixtures for tests that run on the stacks; imported by ``integration/conftest.py``.

``stack``   a running stack; the test is run on each
``stacks``  ``stacks(name)`` -> that running stack, for tests between two
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from integration.stand import Workspace

from .build import RELEASES
from .stack import Stack

Stacks = Callable[[str], Stack]


@pytest.fixture(scope="session")
def stacks(workspace: Workspace) -> Iterator[Stacks]:
    """Each stack is started when it is first asked for, and ends with the run."""
    running: dict[str, Stack] = {}

    def find(name: str) -> Stack:
        if name not in running:
            running[name] = Stack(workspace, name)
        return running[name]

    yield find
    for stack in running.values():
        stack.close()


@pytest.fixture(params=RELEASES)
def stack(request: pytest.FixtureRequest, stacks: Stacks) -> Stack:
    """A running stack."""
    return stacks(request.param)
