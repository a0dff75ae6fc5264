"""Manifests: what was written comes back, everything else is damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.backup.manifest import (
    Manifest,
    PointDisk,
    PointFile,
    check_target,
    format_manifest,
    new_id,
    parse_manifest,
)
from ckptmgr.errors import InvalidRequest, RepositoryDamaged

from .repositories import identity, manifest, point_disk
from .strategies import names, texts

FILE = PointFile("nvram", "nvram.fd", "/var/lib/x", 5, "a" * 64)
WHOLE = manifest(
    "tuesday", "monday", disks=(point_disk("vda", "monday"), point_disk("vdb")), files=(FILE,)
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    name, base, parent = draw(st.tuples(names, names, names).filter(lambda all_: len({*all_}) == 3))
    disks = tuple(
        point_disk(
            target,
            draw(st.sampled_from([None, base])),
            bytes=draw(st.integers(0, 2**63 - 1)),
            compression=draw(st.sampled_from([None, "zstd"])),
            reason=draw(st.none() | texts),
        )
        for target in draw(st.lists(st.sampled_from(["vda", "vdb", "sda"]), unique=True))
    )
    return manifest(
        name,
        draw(st.sampled_from([None, parent])),
        domain_name=draw(texts),
        created=draw(st.integers(0, 253402300799)),
        checkpoint=draw(st.none() | names),
        disks=disks,
        files=draw(st.sampled_from([(), (FILE,)])),
    )


def sealed(members: dict[str, Any]) -> bytes:
    members = {key: value for key, value in members.items() if key != "digest"}
    content = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**members, "digest": hashlib.sha256(content).hexdigest()}).encode()


@given(manifests())
def test_what_was_written_comes_back(made: Manifest) -> None:
    assert parse_manifest(format_manifest(made)) == made


@given(st.data())
def test_a_damaged_byte_is_noticed_or_changes_nothing(data: st.DataObject) -> None:
    content = bytearray(format_manifest(WHOLE))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    try:
        found = parse_manifest(bytes(content))
    except RepositoryDamaged:
        return
    assert found == WHOLE


@given(st.data())
def test_a_cut_is_noticed(data: st.DataObject) -> None:
    content = format_manifest(WHOLE)
    with pytest.raises(RepositoryDamaged):
        parse_manifest(content[: data.draw(st.integers(0, len(content) - 2))])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda below: st.lists(below) | st.dictionaries(st.text(), below),
    )
)
def test_any_other_json_is_damaged(value: Any) -> None:
    with pytest.raises(RepositoryDamaged):
        parse_manifest(json.dumps(value).encode())


@pytest.mark.parametrize("content", [b"", b"[" * 100000, b"{" * 9, b"\xff\xfe", b'{"a": NaN}'])
def test_what_is_no_json_is_damaged(content: bytes) -> None:
    with pytest.raises(RepositoryDamaged):
        parse_manifest(content)


def test_a_newer_format_says_so() -> None:
    members = json.loads(format_manifest(WHOLE)) | {"format": 2, "dreams": []}
    with pytest.raises(RepositoryDamaged, match="newer version") as raised:
        parse_manifest(sealed(members))
    assert raised.value.hint is not None


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"format": 0},
        {"format": True},
        {"created": "1"},
        {"created": True},
        {"created": 1.5},
        {"created": -1},
        {"created": 1 << 40},
        {"name": "../x"},
        {"name": ".hidden"},
        {"name": None},
        {"parent": "tuesday"},
        {"parent": None},
        {"parent_id": None},
        {"parent_id": "x"},
        {"id": "5F" * 16},
        {"domain_uuid": "web"},
        {"domain_uuid": "6695EB01-F6A4-8304-79AA-97F2502E193F"},
        {"disks": {}},
        {"disks": [1]},
        {"files": None},
        {"checkpoint": "a/b"},
    ],
)
def test_what_cannot_be_a_point_is_damaged_though_it_is_sealed(change: dict[str, Any]) -> None:
    with pytest.raises(RepositoryDamaged):
        parse_manifest(sealed(json.loads(format_manifest(WHOLE)) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc"},
        {"name": "a" * 33},
        {"file": "../monday/vda.qcow2"},
        {"file": "/etc/passwd"},
        {"file": ".x"},
        {"file": ""},
        {"file": "manifest.json"},
        {"file": "vda.digests"},
        {"digests": "a/b"},
        {"mode": "differential"},
        {"mode": "full"},
        {"base": None},
        {"base_id": None},
        {"base_id": "zz"},
        {"base": "tuesday"},
        {"base": "a\nb"},
        {"bytes": -1},
        {"virtual_size": 2**63},
        {"digests_sha256": "0"},
    ],
)
def test_a_disk_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    disk = replace(point_disk("vda", "monday"), **change)
    with pytest.raises(ValueError, match=r"."):
        format_manifest(replace(WHOLE, disks=(disk,)))
    members = json.loads(format_manifest(WHOLE))
    members["disks"][0] |= change
    with pytest.raises(RepositoryDamaged):
        parse_manifest(sealed(members))


@pytest.mark.parametrize(
    "change", [{"file": "a/b"}, {"role": "The Role"}, {"bytes": -1}, {"sha256": "?"}]
)
def test_a_file_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        format_manifest(replace(WHOLE, files=(replace(FILE, **change),)))


def test_disks_and_files_of_one_name_are_refused() -> None:
    for disks in [(point_disk(), point_disk()), (point_disk("a"), point_disk("b", file="a.qcow2"))]:
        with pytest.raises(ValueError, match="twice"):
            format_manifest(replace(WHOLE, disks=disks))


def test_ids_are_new_and_valid() -> None:
    first, second = new_id(), new_id()
    assert first != second
    assert parse_manifest(format_manifest(replace(WHOLE, id=first))).id == first


def test_a_target_that_can_be_no_file_name_is_refused() -> None:
    assert check_target("vda") == "vda"
    for target in ("", "a/b", "..", "v da", "x" * 33, "vda\n"):
        with pytest.raises(InvalidRequest):
            check_target(target)


def test_parts_are_found_by_name() -> None:
    assert isinstance(WHOLE.disk("vdb"), PointDisk)
    assert WHOLE.disk("vdc") is None
    assert WHOLE.file("nvram") == FILE
    assert WHOLE.file("tpm") is None
    expected = {"vda.qcow2", "vda.digests", "vdb.qcow2", "vdb.digests", "nvram.fd"}
    assert WHOLE.file_names == expected
    assert identity("a") != identity("b")
