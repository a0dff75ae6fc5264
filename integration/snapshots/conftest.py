"""Fixtures of the tests of snapshots: a machine with its model, and one with two snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.branch_model import Branches
from integration.conftest import MakeMachine
from integration.stand import DiskSpec, Stand

from .scene import DISKS, MakeBranches


@pytest.fixture
def make(make_vm_on: MakeMachine, stand: Stand, engine: str, tmp_path: Path) -> MakeBranches:
    """``make(disks, **options)``: a machine and its model."""

    def make(disks: tuple[DiskSpec, ...] = DISKS, **options: object) -> Branches:
        return Branches(make_vm_on(stand, disks, **options), tmp_path / "store", engine)

    return make


@pytest.fixture
def scene(make: MakeBranches) -> Branches:
    """c1, snapshot s1, c2, snapshot s2, with writes before, between and after."""
    scene = make()
    scene.begin()
    return scene
