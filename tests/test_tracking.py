"""What a new checkpoint records of each disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptmgr.align import AlignedDisk
from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ckptmgr.domain.disk import Bitmap, Disk, DiskLayers, Image, Layer
from ckptmgr.history import History
from ckptmgr.operation.tracking import create_disk, recorded_disk, restored_disk, shown_disks

IMAGE = Image(
    "file", "/img/a", "/img/a", "qcow2", qcow2_version=3, cluster_size=65536, size=1 << 20
)
DISK = Disk("vda", "virtio", chain=(IMAGE,), size=1 << 20)
CHOICE = AlignedDisk("vda", "c1", granularity=65536)
HISTORY = History(
    {
        "c0": Checkpoint(
            name="c0",
            created=1,
            parent=None,
            engine=EngineName.OFFLINE,
            disks=(
                CheckpointDisk(
                    "vda",
                    bitmap="c0",
                    granularity=65536,
                    size=1 << 20,
                    source="/img/a",
                    state=State.RECORDING,
                ),
            ),
        )
    },
    "c0",
)


def layers(**state: bool) -> DiskLayers:
    """The image with the bitmap of c0."""
    bitmap = replace(Bitmap("c0", 65536, recording=True), **state)  # type: ignore[arg-type]
    return DiskLayers("vda", (Layer("/img/a", size=1 << 20, bitmaps=(bitmap,)),))


def since(found: DiskLayers | None, unreadable: frozenset[str] = frozenset()) -> str | None:
    """Since which checkpoint a map is read."""
    return create_disk(HISTORY, CHOICE, (DISK,), found, None, unreadable).since


def test_a_map_is_read_only_from_a_bitmap_that_can_answer() -> None:
    assert since(layers()) == "c0"
    assert since(None) == "c0"  # an engine that does not look
    assert since(layers(recording=False)) is None
    assert since(layers(inconsistent=True)) is None
    assert since(DiskLayers("vda", (Layer("/img/a", size=1 << 20),))) is None
    assert since(layers(), frozenset({"vda"})) is None


def test_an_interval_is_unknown_until_its_map_is_read() -> None:
    found = recorded_disk("c1", HISTORY, CHOICE, DISK, layers())
    assert found.interval is not None
    assert (found.interval.since, found.interval.map) == ("c0", None)
    assert "c1" in (found.interval.reason or "")
    first = recorded_disk("c1", History(), CHOICE, DISK, layers())
    assert first.interval is None


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        (Disk("vda", "virtio"), "no medium"),
        (replace(DISK, read_only=True), "read-only"),
        (replace(DISK, chain=(replace(IMAGE, qcow2_version=2),)), "version 2"),
        (replace(DISK, chain=(replace(IMAGE, format="raw"),)), "raw"),
    ],
)
def test_a_restored_disk_that_keeps_no_bitmap_says_why(disk: Disk, reason: str) -> None:
    found = restored_disk("r", disk, Interval("c0", None, "unknown"))
    assert (found.bitmap, found.state, found.interval) == (None, State.NONE, None)
    assert reason in (found.reason or "")


def test_a_restored_disk_records_from_its_new_image_on() -> None:
    way_back = Interval("c0", "0" * 64)
    found = restored_disk("r", DISK, way_back)
    assert (found.bitmap, found.state, found.interval) == ("r", State.RECORDING, way_back)
    assert (found.granularity, found.source, found.reason) == (65536, "/img/a", None)


def test_libvirt_is_asked_for_no_bitmap_that_the_image_does_not_hold() -> None:
    (disk,) = HISTORY.get("c0").disks
    kept = replace(HISTORY.get("c0"), disks=(disk, replace(disk, name="vdb", persistent=False)))
    assert shown_disks(kept) == [("vda", "bitmap"), ("vdb", "no")]
