from __future__ import annotations

import pytest

from ckptmgr.errors import BitmapBroken, Busy, CheckpointExists, NodeUnknown, Unsupported
from ckptmgr.plan import monitor as planner
from ckptmgr.plan.request import (
    CreateDisk,
    CreateRequest,
    DeleteDisk,
    DeleteRequest,
    ReadDisk,
    ReadRequest,
    UndoRequest,
)
from ckptmgr.plan.steps import (
    BitmapRef,
    BitmapsRemove,
    CheckpointDelete,
    CheckpointRedefine,
    NbdExport,
    NbdStart,
    NbdStop,
    Quiesced,
    ReadMaps,
    ScratchRemove,
    TcpServer,
    Transaction,
)
from tests.plan_examples import bitmap, disk, layer

SOCKET = "/run/x.sock"
ADD = "block-dirty-bitmap-add"
MERGE = "block-dirty-bitmap-merge"


def request(*disks: CreateDisk, tell: bool = False, quiesce: float | None = None) -> CreateRequest:
    return CreateRequest("c2", "", "<redefinition/>", disks, SOCKET, tell, quiesce)


def transaction(plan) -> list[dict]:
    (found,) = [step for step in plan.steps if isinstance(step, Transaction)]
    return list(found.actions)


def test_a_first_checkpoint_is_one_transaction_of_bitmaps_as_libvirt_makes_them():
    plan = planner.create(
        request(
            CreateDisk("vda", layers=disk("vda", layer(1))),
            CreateDisk("vdb", layers=disk("vdb", layer(2))),
        )
    )
    assert plan.steps == (
        Transaction(
            tuple(
                {
                    "type": ADD,
                    "data": {
                        "node": f"libvirt-{number}-format",
                        "name": "c2",
                        "persistent": True,
                        "disabled": False,
                    },
                }
                for number in (1, 2)
            )
        ),
    )


def test_a_raw_disk_gets_a_bitmap_that_is_not_persistent():
    raw = disk("vda", layer(1, format="raw"))
    plan = planner.create(request(CreateDisk("vda", persistent=False, layers=raw)))
    assert transaction(plan)[0]["data"]["persistent"] is False


def test_a_granularity_is_given_only_where_it_was_asked_for():
    plan = planner.create(
        request(CreateDisk("vda", granularity=4096, layers=disk("vda", layer(1))))
    )
    assert transaction(plan)[0]["data"]["granularity"] == 4096


def test_new_bitmaps_and_copies_of_the_old_ones_are_made_in_one_transaction():
    plan = planner.create(
        request(
            CreateDisk("vda", since="c1", layers=disk("vda", layer(1, bitmap("c1")))),
            CreateDisk("vdb", layers=disk("vdb", layer(2))),
        )
    )
    types = [(action["type"], action["data"].get("name")) for action in transaction(plan)]
    assert types == [(ADD, "c2"), (ADD, "c2"), (ADD, "ckptmgr-vda"), (MERGE, None)]


def test_the_copy_does_not_record_and_is_not_kept():
    layers = disk("vda", layer(1, bitmap("c1", 4096)))
    copy = transaction(planner.create(request(CreateDisk("vda", since="c1", layers=layers))))[1]
    assert copy["data"] == {
        "node": "libvirt-1-format",
        "name": "ckptmgr-vda",
        "persistent": False,
        "disabled": True,
        "granularity": 4096,
    }


def test_the_copy_joins_every_layer_that_has_the_bitmap():
    layers = disk(
        "vda", layer(3, bitmap("c1")), layer(2, bitmap("c1", 4096), read_only=True), layer(1)
    )
    actions = transaction(planner.create(request(CreateDisk("vda", since="c1", layers=layers))))
    assert actions[1]["data"]["granularity"] == 4096
    assert actions[2]["data"] == {
        "node": "libvirt-3-format",
        "target": "ckptmgr-vda",
        "bitmaps": [
            {"node": "libvirt-3-format", "name": "c1"},
            {"node": "libvirt-2-format", "name": "c1"},
        ],
    }


def test_the_nbd_server_is_started_before_anything_is_changed():
    """A server or a backup job of others refuses it; then no bitmap has been made."""
    layers = disk("vda", layer(1, bitmap("c1")))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    assert [type(step) for step in plan.steps] == [
        NbdStart,
        Transaction,
        NbdExport,
        ReadMaps,
        NbdStop,
        BitmapsRemove,
    ]


def test_the_monitor_opens_no_port_and_ends_nothing_that_listens_on_one():
    far = TcpServer("192.0.2.7", 10809)
    layers = disk("vda", layer(1, bitmap("c1")))
    with pytest.raises(Unsupported, match="unix socket"):
        planner.read(ReadRequest((ReadDisk("vda", "c1", layers=layers),), far))
    undo = planner.undo_create(UndoRequest("c2", "", (layers,), far))
    assert [type(step) for step in undo] == [BitmapsRemove]


def test_a_copy_left_by_a_killed_process_is_removed_first():
    layers = disk("vda", layer(1, bitmap("c1"), bitmap("ckptmgr-vda", recording=False)))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    assert [type(step) for step in plan.steps[:4]] == [
        NbdStop,
        BitmapsRemove,
        NbdStart,
        Transaction,
    ]
    removal = plan.steps[1]
    assert isinstance(removal, BitmapsRemove)
    assert [ref.name for ref in removal.bitmaps] == ["ckptmgr-vda"]


def test_a_bitmap_of_the_name_in_any_layer_refuses_the_checkpoint():
    layers = disk("vda", layer(2), layer(1, bitmap("c2", inconsistent=True)))
    with pytest.raises(CheckpointExists, match=r"vda.*/img/1\.qcow2"):
        planner.create(request(CreateDisk("vda", layers=layers)))


@pytest.mark.parametrize(
    "layers",
    [
        disk("vda", layer(1)),
        disk("vda", layer(1, bitmap("c1", recording=False))),
        disk("vda", layer(1, bitmap("c1", inconsistent=True))),
        disk("vda", layer(2), layer(1, bitmap("c1"))),
        disk("vda", layer(2, bitmap("c1"), size=1 << 20), layer(1, bitmap("c1"))),
    ],
    ids=["missing", "frozen", "inconsistent", "not on top", "resized"],
)
def test_a_bitmap_that_cannot_be_trusted_is_never_read(layers):
    with pytest.raises(BitmapBroken) as caught:
        planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    assert caught.value.disk == "vda"
    with pytest.raises(BitmapBroken):
        planner.read(ReadRequest((ReadDisk("vda", "c1", layers=layers),), SOCKET))


def test_a_node_that_is_not_known_is_not_guessed():
    unknown = disk("vda", layer(1).__class__(image="/img/a.qcow2"))
    with pytest.raises(NodeUnknown, match=r"/img/a\.qcow2.*vda"):
        planner.create(request(CreateDisk("vda", layers=unknown)))


def test_libvirt_is_told_last_and_only_where_asked():
    layers = disk("vda", layer(1))
    told = planner.create(request(CreateDisk("vda", layers=layers), tell=True))
    assert told.steps[-1] == CheckpointRedefine("c2", "<redefinition/>")
    untold = planner.create(request(CreateDisk("vda", layers=layers)))
    assert not any(isinstance(step, CheckpointRedefine) for step in untold.steps)


def test_the_guest_is_frozen_only_for_the_transaction():
    layers = disk("vda", layer(1, bitmap("c1")))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers), quiesce=5.0))
    frozen = [step for step in plan.steps if isinstance(step, Quiesced)]
    assert [type(step.step) for step in frozen] == [Transaction]


def test_undo_removes_what_a_create_makes_and_tolerates_what_it_did_not():
    layers = disk("vda", layer(1, bitmap("c1")))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers), tell=True))
    assert plan.undo == (
        CheckpointDelete("c2", metadata_only=True, missing_ok=True),
        NbdStop(SOCKET),
        ScratchRemove(),
        BitmapsRemove(
            (
                BitmapRef("libvirt-1-format", "c2", "vda", "/img/1.qcow2"),
                BitmapRef("libvirt-1-format", "ckptmgr-vda", "vda", "/img/1.qcow2"),
            ),
            missing_ok=True,
        ),
    )


def test_release_leaves_bitmaps_of_the_checkpoints_name_alone():
    layers = disk("vda", layer(1, bitmap("c1")))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    removed = [
        ref.name for step in plan.release if isinstance(step, BitmapsRemove) for ref in step.bitmaps
    ]
    assert removed == ["ckptmgr-vda"]


def test_undo_after_a_snapshot_finds_the_bitmaps_below_the_new_overlay():
    now = disk(
        "vda",
        layer(2, bitmap("c2")),
        layer(1, bitmap("c2"), bitmap("ckptmgr-vda", recording=False), read_only=True),
    )
    steps = planner.undo_create(UndoRequest("c2", "", (now,), SOCKET))
    (removal,) = [step for step in steps if isinstance(step, BitmapsRemove)]
    assert {(ref.node, ref.name, ref.read_only) for ref in removal.bitmaps} == {
        ("libvirt-2-format", "c2", False),
        ("libvirt-1-format", "c2", True),
        ("libvirt-2-format", "ckptmgr-vda", False),
        ("libvirt-1-format", "ckptmgr-vda", True),
    }


def test_delete_removes_the_bitmap_from_every_layer_whatever_its_state():
    layers = disk(
        "vda",
        layer(3, bitmap("c2", inconsistent=True)),
        layer(2),
        layer(1, bitmap("c2", recording=False), bitmap("c1"), read_only=True),
    )
    plan = planner.delete(DeleteRequest("c2", (DeleteDisk("vda", layers),), known_to_libvirt=True))
    removal, metadata = plan.steps
    assert isinstance(removal, BitmapsRemove)
    assert [(ref.node, ref.read_only) for ref in removal.bitmaps] == [
        ("libvirt-3-format", False),
        ("libvirt-1-format", True),
    ]
    assert metadata == CheckpointDelete("c2", metadata_only=True, missing_ok=True)


def test_delete_of_a_bitmap_that_a_job_uses_is_refused_before_anything_is_removed():
    layers = disk("vda", layer(1, bitmap("c2", busy=True)))
    with pytest.raises(Busy, match="vda"):
        planner.delete(DeleteRequest("c2", (DeleteDisk("vda", layers),), known_to_libvirt=False))


def test_delete_of_metadata_alone_leaves_the_bitmaps():
    layers = disk("vda", layer(1, bitmap("c2", busy=True)))
    asked = DeleteRequest("c2", (DeleteDisk("vda", layers),), True, metadata_only=True)
    assert [type(step) for step in planner.delete(asked).steps] == [CheckpointDelete]


def test_reading_copies_all_disks_at_one_instant_and_removes_the_copies():
    plan = planner.read(
        ReadRequest(
            (
                ReadDisk("vda", "c1", layers=disk("vda", layer(1, bitmap("c1")))),
                ReadDisk("vdb", "c0", layers=disk("vdb", layer(2, bitmap("c0")))),
            ),
            SOCKET,
        )
    )
    assert [action["data"].get("name") for action in transaction(plan)] == [
        "ckptmgr-vda",
        None,
        "ckptmgr-vdb",
        None,
    ]
    removal = plan.steps[-1]
    assert isinstance(removal, BitmapsRemove)
    assert [ref.name for ref in removal.bitmaps] == ["ckptmgr-vda", "ckptmgr-vdb"]


def test_reading_without_a_place_for_a_socket_is_refused():
    layers = disk("vda", layer(1, bitmap("c1")))
    with pytest.raises(Unsupported, match="socket"):
        planner.read(ReadRequest((ReadDisk("vda", "c1", layers=layers),)))
