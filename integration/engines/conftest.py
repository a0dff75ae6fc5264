"""Fixtures of the tests of engines: a driver of each engine, or of each for running machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptmgr.checkpoint import EngineName
from integration.conftest import MakeMachine
from integration.stand import Stand

from .driver import DISKS, ENGINES, LIBVIRT, MONITOR, OFFLINE, Driver


@pytest.fixture(params=list(ENGINES), ids=[str(engine) for engine in ENGINES])
def driver(
    request: pytest.FixtureRequest, stand: Stand, make_vm_on: MakeMachine
) -> Iterator[Driver]:
    engine: EngineName = request.param
    machine = make_vm_on(stand, DISKS, state="stopped" if engine is OFFLINE else "paused")
    return Driver(machine, engine)


@pytest.fixture(params=[LIBVIRT, MONITOR], ids=["libvirt", "monitor"])
def running(
    request: pytest.FixtureRequest, stand: Stand, make_vm_on: MakeMachine
) -> Iterator[Driver]:
    return Driver(make_vm_on(stand, DISKS), request.param)
