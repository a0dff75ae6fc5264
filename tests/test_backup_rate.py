"""The limit of a backup: what may be asked for by when."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.rate import REQUEST, UNLIMITED, Rate

LIMITS = st.integers(1, 1 << 32)
SLIGHTLY = 1 + 1e-9
"""Of sums of seconds."""


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0  # where floats are finest

    def __call__(self) -> float:
        return self.now


def asked(
    limit: int, lengths: list[int], answers: list[float]
) -> Iterator[tuple[float, float, int]]:
    """``(waited, at, bytes)``: how long each request had to wait, when it was made since the
    beginning, and how much was asked for until then, with it.

    answers -- seconds in which the server answers each of them
    """
    time = Time()
    rate = Rate(limit, time)
    total = 0
    for length, seconds in zip(lengths, answers, strict=True):
        waited = rate.wait(length)
        time.now += waited
        total += length
        yield waited, time.now, total
        time.now += seconds


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[int], list[float]]:
    limit = draw(LIMITS)
    most = Rate(limit).request * BLOCK
    lengths = draw(st.lists(st.integers(512, most), min_size=1, max_size=60))
    answer = st.floats(0, 3 * most / limit)
    return limit, lengths, [draw(answer) for _ in lengths]


@given(requests())
def test_at_no_time_was_more_asked_for_than_the_limit_gives(
    made: tuple[int, list[int], list[float]],
) -> None:
    """Neither in all, so that a short backup is no faster, nor after the server was slow."""
    limit, lengths, _ = made
    seen = [(0.0, 0), *((at, total) for _, at, total in asked(*made))]
    assert seen[-1][0] * SLIGHTLY >= sum(lengths) / limit
    for number, (at, total) in enumerate(seen):
        assert total <= limit * at * SLIGHTLY
        for since, before in seen[number + 1 :: 7]:
            most = limit * (since - at) + limit / 2 + Rate(limit).request * BLOCK
            assert before - total <= most * SLIGHTLY


@given(requests())
def test_nobody_waits_longer_than_the_limit_asks(made: tuple[int, list[int], list[float]]) -> None:
    limit, lengths, _ = made
    at_once = [at for _, at, _ in asked(limit, lengths, [0.0] * len(lengths))]
    assert at_once[-1] <= sum(lengths) / limit * SLIGHTLY
    for (waited, _, _), length in zip(asked(*made), lengths, strict=True):
        assert waited <= length / limit * SLIGHTLY


@given(LIMITS)
def test_a_request_is_what_the_limit_gives_in_half_a_second(limit: int) -> None:
    blocks = Rate(limit).request
    assert 1 <= blocks <= REQUEST
    assert blocks == 1 or blocks * BLOCK <= limit / 2
    assert blocks == REQUEST or (blocks + 1) * BLOCK > limit / 2


def test_without_a_limit_nobody_waits() -> None:
    assert UNLIMITED.request == REQUEST
    assert UNLIMITED.wait(1 << 40) == 0
