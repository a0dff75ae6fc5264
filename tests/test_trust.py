"""Which recorded bitmaps can still mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import CheckpointDisk, State
from ckptmgr.domain.disk import Disk, Image
from ckptmgr.trust import doubt, moved

THEN = CheckpointDisk("vda", "c1", size=64, source="/img/a.qcow2", state=State.RECORDING)


def disk(size: int | None = 64, *sources: str, target: str = "vda") -> Disk:
    images = tuple(Image("file", each, path=each) for each in sources or ("/img/a.qcow2",))
    return Disk(target, "virtio", chain=images, size=size)


def test_a_disk_that_is_as_it_was_is_trusted() -> None:
    assert doubt(THEN, (disk(),)) is None


def test_an_overlay_of_the_same_size_is_trusted() -> None:
    assert doubt(THEN, (disk(64, "/img/b.qcow2", "/img/a.qcow2"),)) is None


def test_growth_alone_is_trusted() -> None:
    assert doubt(THEN, (disk(128),)) is None
    assert doubt(THEN, (disk(128, "/img/b.qcow2", "/img/a.qcow2"),)) is None


def test_a_block_job_between_images_of_one_size_is_trusted() -> None:
    assert doubt(THEN, (disk(64, "/img/b.qcow2"),)) is None


def test_a_block_job_after_growth_has_lost_the_bitmap() -> None:
    """libvirt 9.0: checkpoint, snapshot, blockresize, blockpull: nothing seems to have changed."""
    found = doubt(THEN, (disk(128, "/img/b.qcow2"),))
    assert found is not None
    assert found.code == "bitmap-lost-in-job"
    assert "/img/a.qcow2 has left its backing chain" in str(found)


def test_a_bitmap_cannot_be_read_across_layers_of_different_sizes() -> None:
    """libvirt's backup job fails altogether then: "Bitmaps are of different sizes"."""
    overlay = Image("file", "/img/b.qcow2", path="/img/b.qcow2", size=128)
    base = Image("file", "/img/a.qcow2", path="/img/a.qcow2", size=64)
    now = Disk("vda", "virtio", chain=(overlay, base), size=128)
    found = doubt(THEN, (now,))
    assert found is not None
    assert found.code == "layer-smaller"
    assert "/img/a.qcow2 has another size" in str(found)
    # One that began on the overlay is not concerned.
    later = replace(THEN, size=128, source="/img/b.qcow2")
    assert doubt(later, (now,)) is None


def test_a_smaller_disk_is_not_trusted() -> None:
    found = doubt(THEN, (disk(32),))
    assert found is not None
    assert found.code == "disk-shrunk"
    assert "32 bytes, 64 then" in str(found)


@pytest.mark.parametrize("disks", [(), (disk(target="vdb"),), (Disk("vda", "sata"),)])
def test_a_disk_that_is_gone_is_not_trusted(disks: tuple[Disk, ...]) -> None:
    found = doubt(THEN, disks)
    assert found is not None
    assert found.code == "disk-gone"


def test_an_image_is_recognised_by_the_path_of_its_volume() -> None:
    volume = Image("volume", "volume:pool/a", path="/img/a.qcow2")
    now = Disk("vda", "virtio", chain=(volume,), size=128)
    assert not moved(THEN, now)
    assert doubt(THEN, (now,)) is None


@given(st.none() | st.integers(0, 200), st.none() | st.integers(0, 200), st.booleans())
def test_what_is_not_known_is_no_doubt_and_nothing_smaller_is_trusted(
    then: int | None, now: int | None, same: bool
) -> None:
    recorded = CheckpointDisk("vda", "c1", size=then, source="/img/a.qcow2")
    found = doubt(recorded, (disk(now, "/img/a.qcow2" if same else "/img/b.qcow2"),))
    if then is None or now is None or then == now:
        assert found is None
    else:
        assert (found is not None) == (now < then or not same)
