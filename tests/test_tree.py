"""Whatever is recorded of who comes after whom, all names are in the tree once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.tree import Tree, tree

names = st.sampled_from("abcdefg")
recorded = st.dictionaries(names, st.none() | st.sampled_from("abcdefgxy"))


def planted(recorded: dict[str, str | None]) -> Tree:
    """Siblings by name."""
    return tree(recorded, lambda name: 0)


def test_siblings_come_by_time_and_then_by_name() -> None:
    made = {"b": 1, "c": 2, "a": 2, "d": 0}
    found = tree({"b": None, "c": "b", "a": "b", "d": "a"}, made.__getitem__)
    assert found.order == ("b", "a", "d", "c")
    assert found.leaves == ("d", "c")
    assert found.ancestors("d") == ("a", "b")
    assert found.descendants("a") == ("d",)


def test_names_in_a_circle_and_orphans_are_roots() -> None:
    found = planted({"a": "b", "b": "a", "c": "a", "d": "lost", "e": "e"})
    assert found.children[None] == ("a", "b", "d", "e")
    assert found.children["a"] == ("c",)


@given(recorded)
def test_every_name_is_there_once_and_after_its_parent(recorded: dict[str, str | None]) -> None:
    found = planted(recorded)
    assert sorted(found.order) == sorted(recorded)
    for name, parent in found.parents.items():
        assert parent is None or parent == recorded[name]
        assert parent is None or found.order.index(parent) < found.order.index(name)
        assert name in found.children[parent]


@given(recorded, st.lists(st.integers(0, 9), min_size=7, max_size=7))
def test_none_is_older_than_its_parent_whatever_the_clock_said(
    recorded: dict[str, str | None], clock: list[int]
) -> None:
    made = dict(zip("abcdefg", clock, strict=True))
    found = tree(recorded, made.__getitem__)
    times = found.times(made.__getitem__)
    assert sorted(times) == sorted(recorded)
    assert list(times.values()) == sorted(times.values())
    order = list(times)
    for name, parent in found.parents.items():
        assert times[name] >= made[name]
        assert parent is None or times[name] >= times[parent]
        assert parent is None or order.index(name) > order.index(parent)


@given(st.data())
def test_the_order_is_that_of_making_as_far_as_a_clock_can_tell(data: st.DataObject) -> None:
    """With a clock that was never put back; and once it has passed all times, also if it was."""
    number = data.draw(st.integers(1, 7))
    parents = {
        name: data.draw(st.none() | st.sampled_from("abcdefg"[:place])) if place else None
        for place, name in enumerate("abcdefg"[:number])
    }
    steady = dict(zip(parents, range(number), strict=True))
    assert list(tree(parents, steady.__getitem__).times(steady.__getitem__)) == list(parents)
    wrong = {name: data.draw(st.integers(0, 9)) for name in parents}
    last = data.draw(st.none() | st.sampled_from(list(parents)))
    wrong["z"] = 10
    assert [*tree({**parents, "z": last}, wrong.__getitem__).times(wrong.__getitem__)][-1] == "z"


def test_between_branches_the_times_alone_tell() -> None:
    """The clock was put back after `c`, and `d` made on another branch: nothing says so."""
    made = {"a": 1, "b": 5, "c": 6, "d": 2}
    times = tree({"a": None, "b": "a", "c": "b", "d": "a"}, made.__getitem__).times(
        made.__getitem__
    )
    assert list(times) == ["a", "d", "b", "c"]
    made = {"a": 1, "b": 5, "c": 2, "d": 3}  # put back on one line: c is not older than b
    times = tree({"a": None, "b": "a", "c": "b", "d": "a"}, made.__getitem__).times(
        made.__getitem__
    )
    assert list(times) == ["a", "d", "b", "c"]


@given(recorded)
def test_ancestors_and_descendants_are_each_others(recorded: dict[str, str | None]) -> None:
    found = planted(recorded)
    for name in recorded:
        for other in recorded:
            assert (other in found.descendants(name)) == (name in found.ancestors(other))


@given(recorded)
def test_only_circles_and_what_is_not_there_make_roots(recorded: dict[str, str | None]) -> None:
    found = planted(recorded)
    for root in found.children[None]:
        above = recorded[root]
        for _ in recorded:  # back to the root, or to where the line ends
            if above is None or above == root:
                break
            above = recorded.get(above)
        assert above is None or above == root


def test_a_long_line_is_walked() -> None:
    line = {str(number): str(number - 1) if number else None for number in range(20_000)}
    found = tree(line, int)
    assert len(found.order) == len(found.descendants("0")) + 1 == 20_000
    assert len(found.ancestors("19999")) == 19_999
