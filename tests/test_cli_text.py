"""Nothing that a name or a number contains may mislead whoever reads it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.cli.text import visible, visible_lines, width
from ckptmgr.cli.units import local_time, percent, size

ANYTHING = st.text(st.characters())  # surrogates, controls, bidi overrides: all of Unicode


@given(ANYTHING)
def test_visible_text_is_one_printable_line(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    shown.encode()  # no surrogates


@given(st.text(st.characters(exclude_categories=["C", "Z"])))
def test_printable_text_is_left_alone(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines", "two\\nlines"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("дом 東京", "дом 東京"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_of_a_message_stay_lines() -> None:
    assert visible_lines("qemu-img: failed\n\x1b[2J\n\n") == ["qemu-img: failed", "\\x1b[2J"]
    assert visible_lines("") == [""]


def test_width_counts_columns_not_characters() -> None:
    assert width("abc") == 3
    assert width("東京") == 4
    assert width("e\u0301") == 1


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (65537, "64.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1024**2 - 1, "1.0 MiB"),  # not 1024.0 KiB
        (10 * 1024**3, "10 GiB"),
        (5 * 1024**6, "5 EiB"),
        (2**80, "1048576 EiB"),
    ],
)
def test_sizes_are_in_binary_units(count: int, shown: str) -> None:
    assert size(count) == shown


@given(st.integers(0, 2**70))
def test_sizes_are_within_half_a_tenth_of_the_truth(count: int) -> None:
    number, unit = size(count).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
    tenths = round(float(number) * 10) if "." in number else int(number) * 10
    assert abs(tenths * factor - count * 10) * 20 <= factor * 10
    if "." not in number:
        assert int(number) * factor == count
    if unit != "EiB":
        assert tenths < 10240


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_no_change_and_all_changed_are_never_rounded_to(part: int, whole: int) -> None:
    shown = percent(part, whole)
    assert (shown == "0%") == (part == 0 or whole == 0)
    assert (shown == "100%") == (0 < whole <= part)


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (1, 3, "33.33%"),
        (1, 4, "25.00%"),
        (1, 10**9, "<0.01%"),
        (10**9 - 1, 10**9, ">99.99%"),
        (2, 1, "100%"),
    ],
)
def test_percent(part: int, whole: int, shown: str) -> None:
    assert percent(part, whole) == shown


def test_times_are_local_and_carry_their_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-5")
    time.tzset()
    try:
        assert local_time(0) == "1970-01-01 05:00:00 +0500"
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.integers())
def test_no_creation_time_is_too_absurd_to_show(seconds: int) -> None:
    assert local_time(seconds).isprintable()
