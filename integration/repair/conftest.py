"""Fixtures of the tests of repair: the machine is prepared once, and each test gets a copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.stand import Embedded

from .scene import Prepared, Scene


@pytest.fixture(
    scope="package", params=["paused", pytest.param("stopped", marks=pytest.mark.thorough)]
)
def prepared(
    request: pytest.FixtureRequest, embedded: Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    return Prepared(embedded, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def scene(prepared: Prepared, tmp_path: Path) -> Iterator[Scene]:
    with prepared.scene(tmp_path / "store") as scene:
        assert scene.codes() == set()
        yield scene
