"""The node of a disk is the right one or an error that names the disk; never a guess.

``domain_qmp.json`` was recorded from QEMU 7.2: two disks on -blockdev (libvirt 9.0) and four on
-drive, with backing chains, given by <qemu:commandline>; statistics left out.
``domain_drive.xml`` is what a libvirt without -blockdev writes for the latter.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.domain.bitmaps import parse_layers
from ckptmgr.domain.disk import Bitmap, Disk, Image
from ckptmgr.domain.disks import parse_disks
from ckptmgr.domain.nodes import (
    assigned_nodes,
    detect_nodes,
    format_node,
    local_path,
    on_blockdev,
)
from ckptmgr.errors import NodeUnknown, OperationFailed

DATA = Path(__file__).parent / "data"
QMP: dict[str, list[dict[str, Any]]] = json.loads((DATA / "domain_qmp.json").read_text())
BLOCKS, STATS, NAMED = (
    QMP["query-block"],
    QMP["query-blockstats"],
    QMP["query-named-block-nodes"],
)
ASSIGNED = parse_disks((DATA / "domain_blockdev.xml").read_text())
DRIVES = parse_disks((DATA / "domain_drive.xml").read_text())
DETECTED = {
    "vda": ("#block197", "#block371", "#block587"),
    "sda": ("#block790", "#block909"),
    "sdb": ("#block1162", "#block1387"),
    "vdb": ("#block1525",),
}


def detect(
    change: Callable[[list[Any], list[Any], list[Any]], None] | None = None,
    disks: tuple[Disk, ...] = DRIVES,
    **options: Any,
) -> dict[str, tuple[str, ...]]:
    blocks, stats, named = copy.deepcopy((BLOCKS, STATS, NAMED))
    if change is not None:
        change(blocks, stats, named)
    return detect_nodes(disks, blocks, stats, named, **options)


def changed(target: str, **fields: Any) -> tuple[Disk, ...]:
    return tuple(replace(disk, **fields) if disk.target == target else disk for disk in DRIVES)


# --- on -blockdev or not -------------------------------------------------------------------------


def test_an_index_on_the_source_says_blockdev_and_none_says_drive() -> None:
    assert on_blockdev(ASSIGNED) is True
    assert on_blockdev(DRIVES) is False  # although libvirt numbers the backing files there, too


def test_empty_drives_alone_are_decided_by_qemus_device_names() -> None:
    empty = tuple(disk for disk in ASSIGNED if disk.empty)
    assert on_blockdev(empty) is None
    assert on_blockdev(empty, BLOCKS) is True
    drive = tuple(disk for disk in DRIVES if disk.empty)
    assert on_blockdev(drive) is None
    assert on_blockdev(drive, BLOCKS) is False


def test_an_sd_card_is_on_drive_always_and_decides_nothing() -> None:
    card = Disk("sda", "sd", chain=(Image("file", "/img/card", "/img/card", "raw"),))
    assert on_blockdev((*ASSIGNED, card)) is True


def test_disks_of_both_kinds_are_an_error() -> None:
    with pytest.raises(NodeUnknown, match="vdb"):
        on_blockdev((ASSIGNED[0], DRIVES[3]), BLOCKS)


def test_an_xml_that_qemu_contradicts_is_an_error() -> None:
    lies = replace(DRIVES[0], chain=(replace(DRIVES[0].top, index=3),))
    assert on_blockdev((lies, DRIVES[3])) is None
    with pytest.raises(NodeUnknown, match="vda"):
        on_blockdev((lies, DRIVES[3]), BLOCKS)


# --- assigned ------------------------------------------------------------------------------------


def test_assigned_names_come_from_the_index() -> None:
    assert assigned_nodes(ASSIGNED[:2], NAMED) == {
        "vda": ("libvirt-4-format", "libvirt-5-format"),
        "vdb": ("libvirt-3-format",),
    }


def test_a_raw_image_without_a_format_node_is_its_storage_node() -> None:
    newer = [node for node in NAMED if node["node-name"] != "libvirt-3-format"]
    assert assigned_nodes(ASSIGNED[:2], newer)["vdb"] == ("libvirt-3-storage",)
    sliced = [*newer, {"node-name": "libvirt-3-slice-sto"}]
    assert assigned_nodes(ASSIGNED[:2], sliced)["vdb"] == ("libvirt-3-slice-sto",)


def test_a_node_that_qemu_does_not_have_is_an_error_naming_the_disk() -> None:
    without = [node for node in NAMED if not node["node-name"].startswith("libvirt-5-")]
    with pytest.raises(NodeUnknown, match=r"vda.*libvirt-5"):
        assigned_nodes(ASSIGNED[:2], without)


def test_a_layer_without_an_index_is_an_error_naming_the_disk() -> None:
    with pytest.raises(NodeUnknown, match="vda"):
        assigned_nodes(DRIVES[:1], NAMED)


def test_the_format_node_is_told_without_qemu_where_it_is_certain() -> None:
    assert format_node(ASSIGNED[0].top) == "libvirt-4-format"
    assert format_node(ASSIGNED[1].top) is None  # raw: depends on libvirt's version
    assert format_node(DRIVES[0].top) is None


# --- detected ------------------------------------------------------------------------------------


def test_virtio_scsi_and_sata_disks_with_their_backing_chains_are_found() -> None:
    assert detect() == DETECTED


def test_only_the_wanted_disks_are_looked_for() -> None:
    def lose_sata(blocks: list[Any], _stats: list[Any], _named: list[Any]) -> None:
        blocks[:] = [block for block in blocks if block["device"] != "drive-sata7-0-0"]

    assert detect(lose_sata, wanted={"vda"}) == {"vda": DETECTED["vda"]}
    with pytest.raises(NodeUnknown, match="disk sdb"):
        detect(lose_sata)


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_the_order_of_qemus_answers_never_matters(random: Any) -> None:
    def shuffle(*answers: list[Any]) -> None:
        for answer in answers:
            random.shuffle(answer)

    disks = list(DRIVES)
    random.shuffle(disks)
    assert detect(shuffle, tuple(disks)) == DETECTED


@settings(max_examples=200)
@given(st.data())
def test_damaged_answers_give_the_right_nodes_or_an_error(data: st.DataObject) -> None:
    """Entries lost, doubled or exchanged: never a wrong node, never one node for two disks."""

    def damage(*answers: list[Any]) -> None:
        for answer in answers:
            for _ in range(data.draw(st.integers(0, 2))):
                one = data.draw(st.integers(0, len(answer) - 1))
                other = data.draw(st.integers(0, len(answer) - 1))
                match data.draw(st.sampled_from(["lose", "double", "exchange", "rename"])):
                    case "lose":
                        if len(answer) > 1:
                            del answer[one]
                    case "double":
                        answer.append(copy.deepcopy(answer[one]))
                    case "exchange":
                        for key in ("device", "node-name", "file"):
                            a, b = answer[one].get(key), answer[other].get(key)
                            if a is not None and b is not None:
                                answer[one][key], answer[other][key] = b, a
                    case "rename":
                        if "node-name" in answer[one]:
                            answer[one]["node-name"] = answer[other].get("node-name", "x")

    try:
        found = detect(damage)
    except NodeUnknown as error:
        assert any(f"{disk.target}" in error.message for disk in DRIVES)
        return
    nodes = [node for layers in found.values() for node in layers]
    assert len(nodes) == len(set(nodes))
    assert found == DETECTED


def test_two_disks_on_one_image_are_refused_and_both_named() -> None:
    twice = (*DRIVES, replace(DRIVES[3], target="vdz", alias="virtio-disk9"))
    with pytest.raises(NodeUnknown, match=r"vdb.*vdz"):
        detect(disks=twice)
    assert detect(disks=twice, wanted={"vda"}) == {"vda": DETECTED["vda"]}


def test_a_disk_that_is_another_ones_base_is_refused() -> None:
    base = DRIVES[0].chain[1]
    twice = (*DRIVES, Disk("vdz", "virtio", alias="virtio-disk9", chain=(base,)))
    with pytest.raises(NodeUnknown, match=r"vdz.*vda"):
        detect(disks=twice, wanted={"vdz"})


def test_two_spellings_of_one_image_are_one_image() -> None:
    twice = (
        *DRIVES,
        Disk("vdz", "virtio", alias="x", chain=(Image("file", "/img/l", "/img/l", "raw"),)),
    )
    with pytest.raises(NodeUnknown, match="vdz"):
        detect(
            disks=twice, wanted={"vdb"}, same=lambda a, b: {a, b} <= {"/img/l", "/img/plain.raw"}
        )


def test_a_base_that_two_disks_share_is_no_obstacle() -> None:
    shared = "/img/virtio-base.qcow2"
    chain = (DRIVES[1].top, replace(DRIVES[0].chain[2]))

    def share(_blocks: list[Any], _stats: list[Any], named: list[Any]) -> None:
        for node in named:
            if node["node-name"] == "#block909":
                node.update(file=shared, drv="qcow2")

    assert detect(share, changed("sda", chain=chain)) == DETECTED


@pytest.mark.parametrize(
    "fields",
    [
        {"alias": None},
        {"alias": "virtio-disk99"},
        {"alias": "virtio-disk8"},  # the device of another disk: the file contradicts
        {"alias": "sata7-0-1"},  # empty in QEMU
        {"chain": (replace(DRIVES[0].top, path="/img/other", source="/img/other"),)},
        {"chain": DRIVES[0].chain[:2]},  # QEMU's chain is longer
        {"chain": (*DRIVES[0].chain, Image("file", "/img/x", "/img/x", "raw"))},
        {"chain": (DRIVES[0].chain[0], DRIVES[0].chain[2], DRIVES[0].chain[1])},
        {"chain": (replace(DRIVES[0].top, format="raw"), *DRIVES[0].chain[1:])},
        {"chain": (Image("network", "rbd:///a/b", None, "qcow2"), *DRIVES[0].chain[1:])},
    ],
)
def test_what_contradicts_the_xml_is_an_error_naming_the_disk(fields: dict[str, Any]) -> None:
    with pytest.raises(NodeUnknown, match="disk vda"):
        detect(disks=changed("vda", **fields))


def test_a_chain_that_libvirt_does_not_know_is_taken_from_qemu_below_a_matching_top() -> None:
    disks = changed("vda", chain=DRIVES[0].chain[:1], chain_known=False)
    assert detect(disks=disks) == DETECTED


def test_a_qdev_of_another_device_is_an_error() -> None:
    def foreign(blocks: list[Any], _stats: list[Any], _named: list[Any]) -> None:
        blocks[0]["qdev"] = "/machine/peripheral/virtio-disk8/virtio-backend"

    with pytest.raises(NodeUnknown, match="disk vda"):
        detect(foreign)


def test_an_old_qemu_that_names_no_nodes_is_an_error() -> None:
    def nameless(blocks: list[Any], stats: list[Any], _named: list[Any]) -> None:
        for block in blocks:
            block.get("inserted", {}).pop("node-name", None)
        for item in stats:
            item.pop("node-name", None)

    with pytest.raises(NodeUnknown, match="disk vda"):
        detect(nameless)


@pytest.mark.parametrize(
    ("driver", "child"),
    [
        ("mirror_top", "backing"),
        ("commit_top", "backing"),
        ("copy-before-write", "parent"),
        ("throttle", "parent"),
    ],
)
def test_filter_nodes_are_skipped(driver: str, child: str) -> None:
    def filtered(blocks: list[Any], stats: list[Any], named: list[Any]) -> None:
        inner = {key: value for key, value in stats[0].items() if key not in ("device", "qdev")}
        top = {"device": stats[0]["device"], "qdev": stats[0]["qdev"], "node-name": "#filter"}
        stats[0] = {**top, child: inner}
        blocks[0]["inserted"]["node-name"] = "#filter"
        named.append({"node-name": "#filter", "drv": driver, "file": "/img/virtio-top.qcow2"})

    assert detect(filtered) == DETECTED


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("/img/a", "/img/a"),
        ("file:/img/a", "/img/a"),
        ("host_device:/dev/sda", "/dev/sda"),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/img/a:b"}}', "/img/a:b"),
        ('json:{"driver":"raw","file.filename":"/img/a"}', "/img/a"),
        ('json:{"driver":"nbd","server":{"host":"h"}}', None),
        ("json:{", None),
        ("rbd:pool/image", None),
        ("nbd://h/x", None),
        ("", None),
    ],
)
def test_local_paths_in_qemus_file_names(file: str, path: str | None) -> None:
    assert local_path(file) == path


# --- bitmaps -------------------------------------------------------------------------------------


def test_layers_have_the_bitmaps_of_their_nodes() -> None:
    nodes = assigned_nodes(ASSIGNED[:2], NAMED)
    vda, vdb = parse_layers(ASSIGNED, nodes, NAMED)
    assert [(layer.image, layer.node, layer.format, layer.size) for layer in vda.layers] == [
        ("/img/vda.qcow2", "libvirt-4-format", "qcow2", 64 << 20),
        ("/img/base.qcow2", "libvirt-5-format", "qcow2", 64 << 20),
    ]
    assert vda.layers[0].bitmaps == (Bitmap("c1", 65536, recording=True, count=0),)
    assert [layer.read_only for layer in vda.layers] == [False, True]
    assert vda.broken("c1") is None
    assert vdb.target == "vdb"
    assert vdb.layers[0].bitmaps == ()


def test_inconsistent_and_nameless_bitmaps() -> None:
    named = copy.deepcopy(NAMED)
    (node,) = [node for node in named if node["node-name"] == "libvirt-4-format"]
    node["dirty-bitmaps"][0].update(recording=False, inconsistent=True)
    node["dirty-bitmaps"].append({"granularity": 65536, "count": 0, "recording": True})
    (vda,) = parse_layers(ASSIGNED, {"vda": ("libvirt-4-format",)}, named)
    assert [bitmap.name for bitmap in vda.layers[0].bitmaps] == ["c1"]
    assert vda.broken("c1") == "inconsistent in /img/vda.qcow2"


def test_a_node_that_went_away_and_an_answer_without_sizes_are_errors() -> None:
    with pytest.raises(OperationFailed, match="vda"):
        parse_layers(ASSIGNED, {"vda": ("#gone",)}, NAMED)
    with pytest.raises(OperationFailed, match="unexpected form"):
        parse_layers(ASSIGNED, {"vda": ("n",)}, [{"node-name": "n"}])
