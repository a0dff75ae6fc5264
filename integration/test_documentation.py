"""The examples of docs/api.md do what they say, on a real VM."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from integration.conftest import MakeMachine
from integration.stand import DiskSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "api.md"
PART = re.compile(r"<!-- write (\w+) (\d+) (\d+) -->|```(python|text)\n(.*?)```", re.DOTALL)


@pytest.mark.not_on_stacks("what is printed names the engine that this machine's libvirt has")
def test_every_example_of_the_api_prints_what_stands_below_it(
    make_vm: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make_vm([DiskSpec("vda"), DiskSpec("vdb")], name="web")
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", vm.uri)
    monkeypatch.setenv("CKPTMGR_STORE", str(tmp_path))
    namespace: dict[str, object] = {}
    printed = ""
    compared = 0
    for target, offset, length, kind, text in PART.findall(DOCUMENT.read_text(encoding="utf-8")):
        if target:
            vm.write(target, int(offset), int(length))
        elif kind == "python":
            assert not printed, f"what is printed before this is not shown:\n{text}"
            text = text.replace("/srv/", f"{tmp_path}/")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, str(DOCUMENT), "exec"), namespace)
            printed = output.getvalue()
        else:
            assert printed == text
            printed = ""
            compared += 1
    assert compared == 17
