"""Writing back early: every byte once, and never an error."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

from ckptmgr.backup.writeback import WriteBack

MIB = 1 << 20


def test_what_is_written_is_begun_once_and_in_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *range: begun.append((file, *range)))
    write_back = WriteBack(7)
    for end in range(0, 100 * MIB, MIB):
        write_back.reached(end)
    spans = [(start, start + length) for file, start, length, _ in begun if file == 7]
    assert len(spans) == 3
    assert spans[0][0] == 0
    assert spans[-1][1] >= 64 * MIB
    assert all(past == start for (_, past), (start, _) in pairwise(spans))


def test_a_file_system_that_cannot_do_it_does_not_matter() -> None:
    WriteBack(-1).reached(100 * MIB)
