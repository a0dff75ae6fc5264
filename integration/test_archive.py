"""archive on each engine: few bitmaps are left, and every difference stays what it was."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.config import Settings
from ckptmgr.store import Store
from integration.conftest import MakeMachine
from integration.evidence import (
    Timeline,
    bitmaps,
    known,
    on_tops,
    told,
    unchanged,
    wipe,
)
from integration.stand import MIB, DiskSpec, Embedded, Machine, Stand

DISKS = (
    DiskSpec("vda", size=12 * MIB + 1536),
    DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2", "raw")),
    DiskSpec("vdc", size=5 * MIB, format="raw"),
)
NAMES = tuple(f"c{number}" for number in range(5))

of_the_store = pytest.mark.not_on_stacks("what is new in it is decided by the store alone")


class Scene:
    """A machine, one engine, and five checkpoints."""

    def __init__(self, engine: str, machine: Machine, host: ckptmgr.Host, store: Path) -> None:
        self.engine = engine
        self.machine = machine
        self.store = store
        self.domain = host.domain(machine.name)
        self.timeline = Timeline(machine)
        self.tracked = {"vda", "vdb"} | ({"vdc"} if engine == "monitor" else set())

    def create(self, name: str, *disks: str) -> None:
        self.timeline.scatter()
        self.domain.create(name, disks=[ckptmgr.DiskRequest(each) for each in disks])
        self.timeline.cut(name)

    def left(self, *names: str) -> None:
        """Just these have bitmaps, in QEMU or the images, and in libvirt's list."""
        assert bitmaps(self.machine) == on_tops(self.machine, self.tracked, *names)
        assert set(known(self.machine)) == set(told(self.machine, dict.fromkeys(names)))
        assert self.domain.check() == ()


@pytest.fixture(
    scope="module",
    params=["libvirt", "monitor", pytest.param("offline", marks=pytest.mark.thorough)],
)
def shared(request: pytest.FixtureRequest, local: Stand) -> Iterator[tuple[str, Machine]]:
    engine: str = request.param
    machine = Machine(local, DISKS, state="stopped" if engine == "offline" else "paused")
    yield engine, machine
    machine.destroy()


@pytest.fixture
def scene(shared: tuple[str, Machine], tmp_path: Path) -> Iterator[Scene]:
    engine, machine = shared
    store = tmp_path / "store"
    with ckptmgr.connect(machine.uri, store=store, engine=engine) as host:
        scene = Scene(engine, machine, host, store)
        for name in NAMES:
            scene.create(name)
        scene.timeline.scatter()
        yield scene
    wipe(machine)


@pytest.mark.each_release
def test_differences_stay_what_they_were(scene: Scene) -> None:
    with unchanged(scene.machine, scene.store):
        assert len(scene.domain.plan_archive(3).steps) >= 2
    assert list(scene.domain.archive(3)) == ["c0", "c1"]
    scene.left("c2", "c3", "c4")
    scene.timeline.check_all(scene.domain, NAMES, scene.tracked)
    gone = scene.domain.archive()
    assert {name: set(disks) for name, disks in gone.items()} == {
        "c2": scene.tracked,
        "c3": scene.tracked,
    }
    scene.left("c4")
    scene.timeline.check_all(scene.domain, NAMES, scene.tracked)
    assert scene.domain.archive() == {}
    states = {
        view.name: {disk.state.value for disk in view.disks if disk.bitmap}
        for view in scene.domain.checkpoints().checkpoints
    }
    assert states == {**{name: {"archived"} for name in NAMES[:4]}, "c4": {"recording"}}


def test_the_history_goes_on_with_one_bitmap(scene: Scene) -> None:
    for number in range(5, 8):
        scene.domain.archive()
        scene.left(f"c{number - 1}")
        scene.create(f"c{number}")
    names = [f"c{number}" for number in range(8)]
    scene.timeline.check_all(scene.domain, names, scene.tracked)
    views = scene.domain.checkpoints(topological=True).checkpoints
    assert [view.parent for view in views] == [None, *names[:-1]]


@of_the_store
def test_archived_checkpoints_are_deleted_and_their_maps_joined(scene: Scene) -> None:
    scene.domain.archive()
    scene.domain.delete("c1")
    scene.domain.delete("c0")
    scene.timeline.check_all(scene.domain, ("c2", "c3", "c4"), scene.tracked)
    scene.left("c4")


@of_the_store
def test_the_only_bitmap_that_records_is_kept_until_there_is_another(scene: Scene) -> None:
    scene.domain.archive()
    with (
        unchanged(scene.machine, scene.store),
        pytest.raises(ckptmgr.OperationFailed, match="c4 cannot be deleted") as caught,
    ):
        scene.domain.delete("c4")
    assert "create another checkpoint first" in str(caught.value.hint)
    with pytest.raises(ckptmgr.OperationFailed):
        scene.domain.plan_delete("c4")
    scene.create("c5")
    assert scene.domain.delete("c4") == ("c4",)
    scene.timeline.check_all(scene.domain, ("c0", "c1", "c2", "c3", "c5"), scene.tracked)
    scene.left("c5")
    assert scene.domain.delete("c0", children=True)[0] == "c0"
    scene.left()


def test_each_disk_keeps_its_own_newest(scene: Scene) -> None:
    scene.create("p", "vda")
    assert {name: set(disks) for name, disks in scene.domain.archive().items()} == {
        "c0": scene.tracked,
        "c1": scene.tracked,
        "c2": scene.tracked,
        "c3": scene.tracked,
        "c4": {"vda"},
    }
    assert bitmaps(scene.machine) == {
        *on_tops(scene.machine, scene.tracked - {"vda"}, "c4"),
        *on_tops(scene.machine, {"vda"}, "p"),
    }
    assert known(scene.machine) == told(scene.machine, {"c4": None, "p": "c4"})
    assert scene.domain.check() == ()
    scene.timeline.scatter()
    for name in NAMES:
        scene.timeline.check(scene.domain, name, None, scene.tracked)
        scene.timeline.check(scene.domain, name, "p", {"vda"})
    scene.create("c5")
    scene.domain.archive()
    scene.left("c5")
    scene.timeline.check(scene.domain, "c0", "c5", scene.tracked)


def test_a_bitmap_is_kept_that_alone_knows_what_changed(scene: Scene) -> None:
    image = scene.machine.images["vda"].name
    if scene.machine.active:
        node = scene.machine.node("vda")
        scene.machine.qmp("block-dirty-bitmap-remove", node=node, name="c4")
    else:
        command = ["qemu-img", "bitmap", "--remove", str(scene.machine.images["vda"]), "c4"]
        subprocess.run(command, check=True)
    # Nobody was told that c4's is lost: it is looked for.
    gone = scene.domain.archive()
    assert "vda" not in gone.get("c3", ())
    assert (image, "c3") in bitmaps(scene.machine)
    for name in NAMES[:4]:
        scene.timeline.check(scene.domain, name, None, scene.tracked)


@of_the_store
def test_bitmaps_that_are_gone_already_are_no_obstacle(scene: Scene) -> None:
    for name in ("c0", "c1"):
        if scene.machine.active:
            node = scene.machine.node("vdb")
            scene.machine.qmp("block-dirty-bitmap-remove", node=node, name=name)
    scene.domain.archive()
    scene.left("c4")
    scene.timeline.check_all(scene.domain, NAMES, scene.tracked)


@of_the_store
def test_the_setting_archives_at_each_create(scene: Scene) -> None:
    settings = Settings(keep_bitmaps=2)
    engine = ckptmgr.EngineName(scene.engine)
    host = ckptmgr.Host(scene.machine.stand.connection, Store(scene.store), settings, engine)
    scene.domain = host.domain(scene.machine.name)
    for number in range(5, 8):
        scene.create(f"c{number}")
        scene.left(f"c{number - 1}", f"c{number}")
    scene.timeline.check_all(scene.domain, ("c0", "c4", "c6", "c7"), scene.tracked)


def test_the_settings_file_is_where_libvirt_s_is(
    embedded: Embedded, make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm([DiskSpec("vda")])
    file = embedded.root / "etc" / "ckptmgr.toml"
    file.write_text("keep_bitmaps = 1\n")
    try:
        with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
            for name in NAMES:
                host.domain(machine.name).create(name)
            assert set(machine.bitmaps("vda")) == {"c4"}
    finally:
        file.unlink()


def test_what_was_archived_while_it_ran_is_told_when_it_is_stopped_and_runs_again(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(DISKS[:2])
    store = tmp_path / "store"
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene = Scene("libvirt", machine, host, store)
        for name in NAMES[:3]:
            scene.create(name)
        scene.domain.archive()
        scene.timeline.scatter()
        machine.stop()
        scene.timeline.check_all(scene.domain, NAMES[:3], scene.tracked)
        scene.create("c3")
        scene.domain.archive()
        scene.left("c3")
        machine.start()
        scene.create("c4")
        scene.timeline.scatter()
        scene.timeline.check_all(scene.domain, NAMES, scene.tracked)
        assert [each.code for each in scene.domain.check()] == []
