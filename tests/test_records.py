"""The record of a domain: what is written comes back, and what is odd is never taken for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import StoreDamaged
from ckptmgr.store import DomainRecord, Intent
from ckptmgr.store.seal import seal_json

from .strategies import digests, names, targets

tails = st.dictionaries(names, st.dictionaries(targets, st.none() | digests), max_size=4)
records = st.builds(
    DomainRecord,
    st.text(max_size=20),
    st.none() | names,
    st.integers(0, 2**62),
    tails,
    st.dictionaries(names, st.none() | names, max_size=4),
    st.none() | names,
    st.none() | st.integers(0, 9999),
    st.dictionaries(st.text(max_size=20), st.uuids().map(str), max_size=3),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: DomainRecord) -> None:
    assert DomainRecord.deserialize(record.serialize()) == record


def test_a_record_of_before_there_were_snapshots_is_read() -> None:
    old = seal_json({"name": "vm", "current": "c2", "generation": 7})
    assert DomainRecord.deserialize(old) == DomainRecord("vm", "c2", 7)


ODD: dict[str, Any] = {
    "tails": [
        [],
        "x",
        {"c1": []},
        {"c1": {"vda": 3}},
        {"c1": {"vda": "ABC"}},
        {"c1": {"vda": "0" * 63}},
        {"c1": {"vda": "0" * 64 + "/.."}},
        {"../c1": {}},
    ],
    "moved": [[], {"c1": 3}, {"c1": "a/b"}, {"": None}, {"c1": ["c0"]}],
    "left": [3, "a/b", "", {}],
    "paused": ["1", 1.5, True, []],
    "repositories": [[], "x", {"/srv": 3}, {"/srv": "../.."}, {"/srv": "ABC"}],
    "current": [3, "a/b"],
    "generation": [-1, "7", None, True],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ODD.items() for value in values], ids=str
)
def test_what_makes_no_sense_is_damage_though_its_digest_is_right(key: str, value: Any) -> None:
    members = {"name": "vm", "current": "c2", "generation": 7, key: value}
    with pytest.raises(StoreDamaged):
        DomainRecord.deserialize(seal_json(members))


@given(records, st.data())
def test_a_record_that_was_changed_is_noticed(record: DomainRecord, data: st.DataObject) -> None:
    members = json.loads(record.serialize())
    key = data.draw(st.sampled_from(["current", "generation", "tails", "moved", "left"]))
    value = data.draw(st.sampled_from(["c9", 99, {"c9": None}, None]))
    if members[key] == value:
        return
    members[key] = value
    with pytest.raises(StoreDamaged):
        DomainRecord.deserialize(json.dumps(members).encode())


def test_an_intent_of_a_revert_comes_back_with_all_that_it_takes() -> None:
    data = {
        "snapshot": "s 1",
        "parent": None,
        "tails": {"c1": {"vda": "0" * 64, "vdb": None}},
        "intervals": {"vda": {"since": "c1", "map": None, "reason": "lost"}},
        "standstill": [3, 3, 1],
        "stamps": {"/img/ü.qcow2": [1, 2]},
    }
    intent = Intent("revert", ("1795392011",), "libvirt", data)
    assert Intent.deserialize(intent.serialize()) == intent
