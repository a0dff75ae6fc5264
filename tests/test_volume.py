from __future__ import annotations

import pytest

from ckptmgr.volume import parse_volume_name, volume_name
from ckptmgr.xml import parse


def test_a_volume_is_found_again_by_its_name() -> None:
    name = volume_name(parse("<source pool='p' volume='a/b:c'/>", what="a source"))
    assert name == "volume:p/a/b:c"
    assert parse_volume_name(name) == ("p", "a/b:c")


@pytest.mark.parametrize("source", ["<source file='/a'/>", "<source pool='p'/>", "<source/>"])
def test_what_is_no_volume_has_no_such_name(source: str) -> None:
    assert volume_name(parse(source, what="a source")) is None


def test_a_path_is_no_volume() -> None:
    assert parse_volume_name("/volume:p/a") is None
