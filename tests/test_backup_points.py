"""Points: their tree, their chains, and what a part of them being lost means for the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.backup.base import Base, find_base
from ckptmgr.backup.manifest import Manifest
from ckptmgr.backup.points import Points
from ckptmgr.errors import NoPoint, RepositoryDamaged
from ckptmgr.history import History

from .repositories import NOON, OTHER_UUID, UUID, identity, manifest, point_disk


def points(*manifests: Manifest) -> Points:
    return Points({each.name: each for each in manifests})


WEEK = points(
    manifest("mo"),
    manifest("tu", "mo", created=NOON + 1),
    manifest("we", "tu", created=NOON + 2, disks=(point_disk(base="tu"), point_disk("vdb"))),
    manifest("th", "we", created=NOON + 3, disks=(point_disk("vdb", "we"),)),
    manifest("fr", "th", created=NOON + 4, disks=(point_disk(base="we"), point_disk("vdb", "th"))),
    manifest("x", "tu", created=NOON + 5, domain_name="test", domain_uuid=OTHER_UUID),
)
"""th left vda out: fr's stands on we's."""


@st.composite
def damaged(draw: st.DrawFn) -> Points:
    """Points with any relations at all, some of them to others of the same name."""
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1))
    found = []
    for name in names:
        others = st.none() | st.sampled_from("abcdefgh").filter(lambda each: each != name)  # noqa: B023
        base, parent = draw(others), draw(others)
        made = manifest(
            name, parent, created=draw(st.integers(0, 3)), disks=(point_disk(base=base),)
        )
        if base is not None and draw(st.booleans()):
            made = replace(made, disks=(point_disk(base=base, base_id="0" * 32),))
        found.append(made)
    return points(*found)


def test_the_tree() -> None:
    assert WEEK.parent("mo") is None
    assert WEEK.parent("x") == "tu"
    assert WEEK.children("tu") == ("we", "x")
    assert WEEK.roots() == ("mo",)
    assert WEEK.leaves() == ("fr", "x")
    assert WEEK.topological() == ("mo", "tu", "we", "th", "fr", "x")
    assert WEEK.ancestors("th") == ("we", "tu", "mo")
    assert WEEK.newest() == "x"
    assert WEEK.newest("web") == "fr"
    assert WEEK.newest(OTHER_UUID) == "x"
    assert WEEK.newest("nobody") is None
    assert WEEK.of("test") == ("x",)
    assert Points({}).newest() is None


@pytest.mark.parametrize("seconds", [0, -3600])
def test_with_the_history_lost_the_next_point_stands_on_the_last(seconds: int) -> None:
    """Also where two were made within a second, or the host's clock was put back between them."""
    found = points(manifest("mo"), manifest("tu", "mo", created=NOON + seconds))
    assert find_base(History(), UUID, {"l": found}) == Base("l", "tu", None)
    other = points(manifest("x", created=NOON + 1))
    assert find_base(History(), UUID, {"l": found, "k": other}) == Base("k", "x", None)
    assert find_base(History(), OTHER_UUID, {"l": found}) is None


def test_chains_are_followed_disk_by_disk() -> None:
    assert WEEK.chain("fr", "vda") == ("fr", "we", "tu", "mo")
    assert WEEK.chain("fr", "vdb") == ("fr", "th", "we")
    assert WEEK.standing("we", "vda") == ("fr",)
    assert WEEK.standing("tu", "vda") == ("we", "x")
    assert WEEK.dependants("we") == ("th", "fr")
    assert WEEK.dependants("we", "vda") == ("fr",)
    assert WEEK.dependants("mo") == ("tu", "we", "fr", "x")
    assert all(WEEK.broken(name) is None for name in WEEK.manifests)


def test_a_lost_point_breaks_what_stands_on_it_and_nothing_else() -> None:
    left = WEEK.only(set(WEEK.manifests) - {"we"})
    assert (
        left.broken("fr")
        == "disk vda of restore point fr stands on we, which is missing or damaged"
    )
    assert left.broken("th") is not None
    assert left.broken("tu") is None
    assert left.broken("x") is None
    assert left.dependants("we") == ("th", "fr")
    assert left.parent("th") is None
    with pytest.raises(RepositoryDamaged, match="missing or damaged"):
        left.chain("fr", "vdb")


def test_a_point_that_was_replaced_by_another_of_its_name_is_not_taken_for_it() -> None:
    other = replace(WEEK.get("tu"), id=identity("another"))
    changed = Points({**WEEK.manifests, "tu": other})
    assert "another point" in (changed.broken("we") or "")
    assert changed.standing("tu", "vda") == ()
    assert changed.dependants("tu") == ("we", "fr", "x")
    assert changed.parent("we") is None
    assert changed.broken("tu") is None


def test_what_is_not_there_is_no_point() -> None:
    for ask in (WEEK.get, WEEK.parent, WEEK.children, WEEK.broken):
        with pytest.raises(NoPoint):
            ask("su")
    with pytest.raises(NoPoint, match="has no disk vdb"):
        WEEK.chain("mo", "vdb")


def test_a_point_that_is_made_with_the_clock_put_back_is_told_of_a_newer_one() -> None:
    """Where it is on another branch: on the same, none is older than the one before it."""
    assert WEEK.newer(manifest("sa", "fr", created=NOON + 9)) is None
    assert WEEK.newer(manifest("sa", "fr", created=NOON)) is None
    assert WEEK.newer(manifest("sa", "tu", created=NOON + 3)) == "fr"
    assert WEEK.newer(manifest("sa", "tu", created=NOON + 4)) is None  # in the same second
    assert WEEK.newer(manifest("sa", created=NOON, domain_uuid=identity("new"))) is None
    assert points().newer(manifest("mo")) is None


@given(damaged())
def test_every_walk_ends_whatever_is_recorded(found: Points) -> None:
    assert sorted(found.topological()) == sorted(found.manifests) == sorted(found.by_time())
    for name in found.manifests:
        assert name not in found.ancestors(name)
        assert name not in found.dependants(name)
        if (reason := found.broken(name)) is None:
            chain = found.chain(name, "vda")
            assert chain[0] == name
            assert found.get(chain[-1]).disks[0].base is None
            for above, base in pairwise(chain):
                assert above in found.standing(base, "vda")
                assert name in found.dependants(base)
        else:
            assert reason
            with pytest.raises(RepositoryDamaged):
                found.chain(name, "vda")
