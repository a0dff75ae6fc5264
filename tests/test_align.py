"""align_disks: the rules of libvirt's virDomainCheckpointAlignDisks, and reasons for the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.align import AlignedDisk, DiskRequest, align_disks, parse_disk_spec, untrackable
from ckptmgr.checkpoint import EngineName
from ckptmgr.domain.disk import Disk, Image
from ckptmgr.errors import InvalidRequest, Unsupported

LIBVIRT, MONITOR, OFFLINE = EngineName.LIBVIRT, EngineName.MONITOR, EngineName.OFFLINE


def image(path: str, format_: str = "qcow2", **known: object) -> Image:
    known.setdefault("qcow2_version", 3 if format_ == "qcow2" else None)
    known.setdefault("cluster_size", 65536 if format_ == "qcow2" else None)
    return Image("file", path, path=path, format=format_, **known)  # type: ignore[arg-type]


VDA = Disk("vda", "virtio", chain=(image("/img/a.qcow2"),))
VDB = Disk("vdb", "virtio", chain=(image("/img/b.qcow2"), image("/img/base.qcow2")))
RAW = Disk("vdc", "virtio", chain=(image("/img/c.raw", "raw"),))
OLD = Disk("vdd", "virtio", chain=(image("/img/d.qcow2", qcow2_version=2),))
CDROM = Disk("sda", "sata", device="cdrom", read_only=True)
LOADED = Disk("sdb", "sata", device="cdrom", read_only=True, chain=(image("/img/x.iso", "raw"),))
TRANSIENT = Disk("vde", "virtio", chain=(image("/img/e.qcow2"),), transient=True)
CARD = Disk("sdz", "sd", chain=(image("/img/z.qcow2"),))
VHOST = Disk("vdu", "virtio", chain=(Image("vhostuser", "/run/v.sock", format="raw"),))
ALL = (VDA, VDB, RAW, OLD, CDROM, LOADED, TRANSIENT, CARD, VHOST)


def tracked(aligned: tuple[AlignedDisk, ...]) -> dict[str, bool]:
    return {disk.target: disk.bitmap is not None for disk in aligned}


def test_unnamed_disks_are_tracked_if_they_can_be_and_the_others_say_why() -> None:
    aligned = align_disks("c1", ALL, (), LIBVIRT)
    assert [disk.target for disk in aligned] == [disk.target for disk in ALL]
    assert {disk.target: disk.reason for disk in aligned} == {
        "vda": None,
        "vdb": None,
        "vdc": "its image is raw, which cannot keep bitmaps",
        "vdd": "its image is qcow2 version 2 (compat=0.10), which cannot keep bitmaps",
        "sda": "there is no medium in it",
        "sdb": "it is read-only",
        "vde": "it is transient",
        "sdz": "libvirt runs no block operations on bus 'sd'",
        "vdu": "it is a vhost-user device, whose writes QEMU does not see",
    }
    assert [disk.bitmap for disk in aligned[:2]] == ["c1", "c1"]


def test_the_monitor_engine_tracks_raw_and_old_images_without_keeping_their_bitmaps() -> None:
    aligned = {disk.target: disk for disk in align_disks("c1", ALL, (), MONITOR)}
    assert (aligned["vda"].bitmap, aligned["vda"].persistent) == ("c1", True)
    assert (aligned["vdc"].bitmap, aligned["vdc"].persistent) == ("c1", False)
    assert (aligned["vdd"].bitmap, aligned["vdd"].persistent) == ("c1", False)
    assert aligned["vdu"].bitmap is None


def test_naming_a_disk_leaves_the_others_out() -> None:
    aligned = align_disks("c1", (VDA, VDB), [DiskRequest("vdb")], LIBVIRT)
    assert tracked(aligned) == {"vda": False, "vdb": True}
    assert aligned[0].reason == "not among the disks asked for"


def test_a_disk_can_be_named_by_the_path_of_its_source() -> None:
    aligned = align_disks("c1", (VDA, VDB), [DiskRequest("/img/b.qcow2")], LIBVIRT)
    assert tracked(aligned) == {"vda": False, "vdb": True}


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([DiskRequest("vdx")], "the domain has no disk 'vdx'"),
        ([DiskRequest("/img/base.qcow2")], "the domain has no disk '/img/base.qcow2'"),
        ([DiskRequest("vda"), DiskRequest("vda")], "disk 'vda' is named twice"),
        ([DiskRequest("vda"), DiskRequest("/img/a.qcow2", track=False)], "is named twice"),
        ([DiskRequest("vda", bitmap="other")], "must be called 'c1'"),
        ([DiskRequest("vda", track=False)], "would track no disk"),
        ([DiskRequest("")], "the domain has no disk ''"),
    ],
)
def test_wrong_requests_are_refused(requests: list[DiskRequest], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        align_disks("c1", (VDA, VDB), requests, LIBVIRT)


def test_a_path_that_two_disks_share_names_neither() -> None:
    twin = replace(VDB, chain=VDA.chain)
    with pytest.raises(InvalidRequest, match="more than one disk"):
        align_disks("c1", (VDA, twin), [DiskRequest("/img/a.qcow2")], LIBVIRT)


@pytest.mark.parametrize("disk", [RAW, OLD, CDROM, LOADED, TRANSIENT, CARD, VHOST])
@pytest.mark.parametrize("engine", [LIBVIRT, OFFLINE])
def test_a_named_disk_that_cannot_be_tracked_is_an_error(disk: Disk, engine: EngineName) -> None:
    with pytest.raises(Unsupported, match=f"disk {disk.target} cannot be tracked"):
        align_disks("c1", (VDA, disk), [DiskRequest(disk.target)], engine)


def test_the_error_on_a_raw_disk_names_the_engine_that_can() -> None:
    with pytest.raises(Unsupported) as raised:
        align_disks("c1", (VDA, RAW), [DiskRequest("vdc")], LIBVIRT)
    assert "--engine monitor" in (raised.value.hint or "")
    with pytest.raises(Unsupported) as raised:
        align_disks("c1", (VDA, CDROM), [DiskRequest("sda")], LIBVIRT)
    assert raised.value.hint is None


def test_a_checkpoint_without_any_disk_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no disks"):
        align_disks("c1", (), (), LIBVIRT)
    with pytest.raises(Unsupported, match="vdc: its image is raw"):
        align_disks("c1", (RAW,), (), LIBVIRT)


@pytest.mark.parametrize(
    "name", ["", ".c", "a/b", "a b", "ä", "c\n", "x" * 201, "a\0", "../x", "c1 "]
)
def test_names_outside_libvirts_schema_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        align_disks(name, (VDA,), (), LIBVIRT)
    assert "200" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["c", "-c", "_", "c.1", "1795379552", "x" * 200])
def test_names_of_libvirts_schema_are_taken(name: str) -> None:
    assert align_disks(name, (VDA,), (), LIBVIRT)[0].bitmap == name


@pytest.mark.parametrize(
    ("cluster", "granularity"),
    [(512, 4096), (4096, 4096), (65536, 65536), (2 << 20, 65536), (None, None)],
)
def test_granularity_is_the_cluster_size_within_qemus_bounds(
    cluster: int | None, granularity: int | None
) -> None:
    disk = Disk("vda", "virtio", chain=(image("/a", cluster_size=cluster),))
    assert align_disks("c1", (disk,), (), LIBVIRT)[0].granularity == granularity


@pytest.mark.parametrize(
    ("spec", "request_"),
    [
        ("vda", DiskRequest("vda")),
        ("vda=no", DiskRequest("vda", track=False)),
        ("vda=bitmap", DiskRequest("vda")),
        ("vda=bitmap:c1", DiskRequest("vda", bitmap="c1")),
        ("/img/a=b.qcow2", DiskRequest("/img/a=b.qcow2")),
        ("/img/a=b.qcow2=no", DiskRequest("/img/a=b.qcow2", track=False)),
    ],
)
def test_disk_specs(spec: str, request_: DiskRequest) -> None:
    assert parse_disk_spec(spec) == request_


@pytest.mark.parametrize("spec", ["", "=no", "vda=", "vda=maybe", "vda=bitmap:", "=", "vda=a=no="])
def test_specs_that_say_nothing_are_refused(spec: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_disk_spec(spec)


formats = st.sampled_from(["qcow2", "raw", "vmdk"])
disks_lists = st.lists(
    st.builds(
        lambda target, format_, version, empty, read_only, transient: Disk(
            target,
            "virtio",
            chain=()
            if empty
            else (
                image(
                    f"/img/{target}", format_, qcow2_version=version if format_ == "qcow2" else None
                ),
            ),
            read_only=read_only,
            transient=transient,
        ),
        st.from_regex(r"vd[a-z]", fullmatch=True),
        formats,
        st.sampled_from([2, 3]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda disk: disk.target,
)


@given(disks_lists, st.data(), st.sampled_from(EngineName))
def test_every_disk_is_decided_once_in_order_and_never_without_a_reason(
    disks: list[Disk], data: st.DataObject, engine: EngineName
) -> None:
    named = data.draw(st.lists(st.sampled_from(disks), unique_by=lambda disk: disk.target))
    requests = [
        DiskRequest(
            data.draw(st.sampled_from([disk.target, f"/img/{disk.target}"]))
            if not disk.empty
            else disk.target,
            track=data.draw(st.booleans()),
        )
        for disk in named
    ]
    try:
        aligned = align_disks("c1", disks, requests, engine)
    except (InvalidRequest, Unsupported):
        wanted = [r for r in requests if r.track]
        able = [disk for disk in disks if untrackable(disk, engine) is None]
        assert (
            not able
            or (requests and not wanted)
            or any(
                r.track and untrackable(disk, engine)
                for r, disk in zip(requests, named, strict=True)
            )
        )
        return
    assert [disk.target for disk in aligned] == [disk.target for disk in disks]
    for disk, choice in zip(disks, aligned, strict=True):
        assert (choice.bitmap is None) == (choice.reason is not None)
        if choice.bitmap is not None:
            assert choice.bitmap == "c1"
            assert untrackable(disk, engine) is None
            if choice.persistent:
                assert disk.top.format == "qcow2"
            else:
                assert engine is EngineName.MONITOR
    assert any(choice.bitmap for choice in aligned)
