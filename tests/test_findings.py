"""check: each mismatch has its name, what it means, its cure, and an action that cures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckptmgr.consistency import Finding, consistent, examine
from ckptmgr.history import History

from .mismatches import CASES
from .observations import FITS, projected


def test_what_is_as_recorded_gives_no_findings() -> None:
    assert examine(FITS) == ()
    assert examine(projected(History())) == ()


@pytest.mark.parametrize("code", CASES)
def test_each_mismatch_is_named_with_its_meaning_cure_and_action(code: str) -> None:
    case = CASES[code]
    found = examine(case.seen)
    assert code in [finding.code for finding in found]
    finding = next(finding for finding in found if finding.code == code)
    assert case.message in finding.message
    assert case.cure in finding.cure
    assert finding.action == case.action
    assert (finding.disk, finding.checkpoint) == (case.disk, case.checkpoint)
    assert finding.harmless is case.harmless
    assert consistent(found) is case.harmless
    for text in (finding.message, finding.cure):
        assert not text.endswith(".")
        assert "\n" not in text
    json.dumps(finding.json())


CONSEQUENCES: dict[str, set[str]] = {
    "disk-replaced": {"disk-replaced"},
    "bitmap-lost-in-job": {"bitmap-lost-in-job"},
    "disk-shrunk": {"disk-shrunk"},
    "rolled-back": {"rolled-back", "missing-bitmap"},
}


@pytest.mark.parametrize("code", CASES)
def test_one_mismatch_is_one_finding_and_not_a_flood(code: str) -> None:
    codes = [finding.code for finding in examine(CASES[code].seen)]
    assert set(codes) == CONSEQUENCES.get(code, {code})
    if code not in CONSEQUENCES:
        assert len(codes) == 1


def test_every_code_is_documented_and_every_documented_code_has_a_case() -> None:
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.partition("### check DOMAIN")[2].partition("### repair")[0]
    rows = [row.partition("|")[2].partition("|")[0] for row in section.splitlines() if "|" in row]
    documented = {code for row in rows for code in row.replace("`", "").replace(",", " ").split()}
    assert documented - {"code", "---"} == set(CASES)


def test_findings_are_values() -> None:
    first, second = examine(CASES["missing-bitmap"].seen), examine(CASES["missing-bitmap"].seen)
    assert first == second
    assert len({*first, *second}) == 1
    assert isinstance(first[0], Finding)
