"""What is left out on the releases because it is shown elsewhere: never all of a cell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import EngineName
from integration.stacks import RELEASES
from integration.stacks.repeats import Case, repeats

STACKS = [*RELEASES, "stacks"]
cases = st.lists(
    st.builds(
        Case,
        scenario=st.sampled_from(["archive", "restore"]),
        engine=st.sampled_from(["any", "auto", *map(str, EngineName)]),
        stack=st.sampled_from(STACKS),
        marked=st.booleans(),
    )
)
owns = st.sampled_from([None, *RELEASES])


def cells(cases: list[Case]) -> set[tuple[str, str, str]]:
    return {(case.scenario, case.engine, case.stack) for case in cases}


@given(cases, owns)
def test_no_cell_and_nothing_that_is_marked_is_lost(cases: list[Case], own: str | None) -> None:
    left = repeats(cases, own)
    kept = [case for case, out in zip(cases, left, strict=True) if not out]
    assert cells(kept) == cells(cases)
    assert [case for case in kept if case.marked] == [case for case in cases if case.marked]


@given(cases, owns)
def test_all_is_run_on_what_this_machine_has_not_with_the_engine_that_is_chosen_there(
    cases: list[Case], own: str | None
) -> None:
    left = [case for case, out in zip(cases, repeats(cases, own), strict=True) if out]
    for case in left:
        assert case.stack == own or case.engine != RELEASES[case.stack].engine
        assert case.stack == own or case.engine in [*EngineName]


def test_of_a_repeat_those_that_are_marked_are_enough() -> None:
    def archive(engine: str, stack: str, *, marked: bool = False) -> Case:
        return Case("archive", engine, stack, marked)

    found = {
        archive("monitor", "debian11"): False,
        archive("libvirt", "debian11"): False,  # none is marked
        archive("offline", "debian11"): True,
        archive("offline", "debian11", marked=True): False,
        archive("any", "debian12"): True,
        archive("any", "debian12", marked=True): False,
        archive("any", "debian13"): False,
        archive("any", "debian13", marked=True): False,
    }
    assert dict(zip(found, repeats(found, "debian12"), strict=True)) == found
