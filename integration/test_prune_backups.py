"""Points that `backup` made are pruned, and the next backup goes on from what stayed."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ckptmgr
from ckptmgr import Retention
from ckptmgr.operation import preparation
from integration.stand import DiskSpec

from .kept_points import shown
from .test_backup import MIB, MakeBackups, backups, modes

__all__ = ["backups"]


def test_the_next_backup_after_a_prune_is_an_increment_and_every_point_is_right(
    backups: MakeBackups, tmp_path: Path
) -> None:
    vm = backups(DiskSpec("vda"), DiskSpec("vdb", size=8 * MIB + 512, cluster_size=4096))
    made = {}
    for number, name in enumerate(("a", "b", "c", "d")):
        vm.scatter(number)
        made[name] = vm.take(name, compress=bool(number % 2))
    catalogue = ckptmgr.repository(vm.repository)
    view = catalogue.prune(Retention(last=2))
    assert [point.name for point in view.points if point.stays] == ["c", "d"]
    assert modes(made["c"]) == {"vda": "incremental", "vdb": "incremental"}
    assert {disk.mode for disk in catalogue.points().points[0].disks} == {"full"}
    vm.check(made["c"], made["d"])

    vm.scatter(9)
    made["e"] = vm.take("e")
    assert modes(made["e"]) == {"vda": "incremental", "vdb": "incremental"}
    assert made["e"].parent == "d"
    vm.check(made["c"], made["d"], made["e"])
    assert catalogue.verify().json() == {"sound": True, "points": 3, "findings": []}

    catalogue.prune(Retention(last=1))
    vm.scatter(10)
    made["f"] = vm.take("f")
    assert modes(made["f"]) == {"vda": "incremental", "vdb": "incremental"}
    vm.check(made["e"], made["f"])
    assert catalogue.verify().sound
    catalogue.restore(vm.machine.name, "f", tmp_path / "restored", flatten=True)
    for disk in ("vda", "vdb"):
        assert shown(tmp_path / "restored" / f"{disk}.qcow2") == vm.held["f"][disk]


@pytest.mark.not_on_stacks("our own code orders the points")
def test_a_point_of_a_new_branch_that_the_clock_makes_older_is_told_of(
    backups: MakeBackups, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock was an hour ahead, and is put back before the domain goes back to monday.

    The domain is shut off: of one that runs, libvirt tells the time of a checkpoint.
    """
    vm = backups(DiskSpec("vda"), state="stopped")
    now = int(time.time())

    def take(name: str, seconds: int) -> list[str]:
        monkeypatch.setattr(preparation, "time", SimpleNamespace(time=lambda: now + seconds))
        caplog.clear()
        vm.take(name)
        return [each.getMessage() for each in caplog.records if "clock" in each.getMessage()]

    assert take("monday", 0) == take("tuesday", 3600) == take("wednesday", 60) == []
    with vm.domain() as domain:
        domain.restore(vm.repository, "monday")
    (said,) = take("thursday", 120)
    assert said.startswith("restore point thursday counts as older than wednesday")
    catalogue = ckptmgr.repository(vm.repository)
    view = catalogue.plan_prune(Retention(last=1))
    assert [point.name for point in view.points if point.stays] == ["wednesday"]
    assert take("friday", 3700) == []
    view = catalogue.plan_prune(Retention(last=1))
    assert [point.name for point in view.points if point.stays] == ["friday"]
