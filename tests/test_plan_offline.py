from __future__ import annotations

from dataclasses import replace

import pytest

from ckptmgr.errors import BitmapBroken, CheckpointExists, InvalidRequest, Unsupported
from ckptmgr.plan import offline as planner
from ckptmgr.plan.request import (
    CreateDisk,
    CreateRequest,
    DeleteDisk,
    DeleteRequest,
    ReadDisk,
    ReadRequest,
    ServeDisk,
    UndoRequest,
)
from ckptmgr.plan.steps import (
    CheckpointDelete,
    CheckpointRedefine,
    ImageBitmap,
    ImagesCheck,
    ImagesRelease,
    ImagesUnchanged,
    ReadImageMap,
)
from tests.plan_examples import bitmap, disk, layer


def request(*disks: CreateDisk, tell: bool = False, quiesce: float | None = None) -> CreateRequest:
    return CreateRequest("c2", "", "<redefinition/>", disks, tell_libvirt=tell, quiesce=quiesce)


def test_every_image_is_checked_before_any_is_changed():
    plan = planner.create(
        request(
            CreateDisk("vda", layers=disk("vda", layer(1))),
            CreateDisk("vdb", layers=disk("vdb", layer(2))),
        )
    )
    assert plan.steps[0] == ImagesCheck((("vda", "/img/1.qcow2"), ("vdb", "/img/2.qcow2")))
    assert [step.action for step in plan.steps[1:]] == ["add", "add"]


def test_the_new_bitmap_records_before_the_old_one_is_read():
    """What is written in between is in both maps: too much, never too little."""
    layers = disk("vda", layer(1, bitmap("c1")))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    assert plan.steps[1:] == (
        ImageBitmap("vda", "/img/1.qcow2", "add", "c2"),
        ReadImageMap("vda", "/img/1.qcow2", "c1", 65536),
    )


def test_the_interval_is_read_from_every_layer_that_has_the_bitmap():
    layers = disk("vda", layer(2, bitmap("c1")), layer(1, bitmap("c1", 4096)))
    plan = planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    reads = [step for step in plan.steps if isinstance(step, ReadImageMap)]
    assert [(step.image, step.granularity) for step in reads] == [
        ("/img/2.qcow2", 65536),
        ("/img/1.qcow2", 4096),
    ]


def test_an_image_that_cannot_keep_bitmaps_is_refused():
    raw = disk("vda", layer(1, format="raw"))
    for persistent in (True, False):
        with pytest.raises(Unsupported, match="vda"):
            planner.create(request(CreateDisk("vda", persistent=persistent, layers=raw)))


def test_only_what_succeeded_is_seen_to_have_been_left_alone():
    """To take a create back must not fail because somebody wrote to what it had read."""
    made = request(CreateDisk("vda", layers=disk("vda", layer(1))))
    plan = planner.create(replace(made, serve=(ServeDisk("vda", "/img/1.qcow2", "qcow2"),)))
    assert plan.steps[0].served == (("vda", "/img/1.qcow2"),)
    assert plan.finish == (ImagesRelease(), ImagesUnchanged())
    assert plan.release == (ImagesRelease(),)
    assert plan.undo[0] == ImagesRelease()
    assert ImagesUnchanged() not in plan.undo


def test_a_bitmap_of_the_name_in_any_layer_refuses_the_checkpoint():
    layers = disk("vda", layer(2), layer(1, bitmap("c2")))
    with pytest.raises(CheckpointExists):
        planner.create(request(CreateDisk("vda", layers=layers)))


def test_a_bitmap_that_was_in_use_at_a_crash_is_never_read():
    layers = disk("vda", layer(1, bitmap("c1", inconsistent=True)))
    with pytest.raises(BitmapBroken):
        planner.create(request(CreateDisk("vda", since="c1", layers=layers)))
    with pytest.raises(BitmapBroken):
        planner.read(ReadRequest((ReadDisk("vda", "c1", layers=layers),)))


def test_there_is_no_guest_to_quiesce():
    with pytest.raises(InvalidRequest):
        planner.create(request(CreateDisk("vda", layers=disk("vda", layer(1))), quiesce=5.0))


def test_undo_removes_the_bitmap_where_it_was_to_be_made():
    layers = disk("vda", layer(2), layer(1))
    plan = planner.create(request(CreateDisk("vda", layers=layers), tell=True))
    assert plan.steps[-1] == CheckpointRedefine("c2", "<redefinition/>")
    assert plan.undo == (
        CheckpointDelete("c2", metadata_only=True, missing_ok=True),
        ImageBitmap("vda", "/img/2.qcow2", "remove", "c2", missing_ok=True),
    )


def test_undo_after_a_snapshot_removes_the_bitmap_from_the_layer_below():
    now = disk("vda", layer(2), layer(1, bitmap("c2")))
    steps = planner.undo_create(UndoRequest("c2", "", (now,)))
    assert [step.image for step in steps] == ["/img/2.qcow2", "/img/1.qcow2"]


def test_delete_checks_all_layers_before_it_removes_from_any():
    layers = disk("vda", layer(2, bitmap("c2")), layer(1, bitmap("c2", inconsistent=True)))
    plan = planner.delete(DeleteRequest("c2", (DeleteDisk("vda", layers),), known_to_libvirt=True))
    assert plan.steps == (
        ImagesCheck((("vda", "/img/2.qcow2"), ("vda", "/img/1.qcow2"))),
        ImageBitmap("vda", "/img/2.qcow2", "remove", "c2"),
        ImageBitmap("vda", "/img/1.qcow2", "remove", "c2"),
        CheckpointDelete("c2", metadata_only=True, missing_ok=True),
    )


def test_delete_of_metadata_alone_needs_no_image():
    layers = disk("vda", layer(1, bitmap("c2")))
    asked = DeleteRequest("c2", (DeleteDisk("vda", layers),), True, metadata_only=True)
    assert [type(step) for step in planner.delete(asked).steps] == [CheckpointDelete]
