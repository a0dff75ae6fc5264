"""The demonstration of a revert is what the README says of it, and compares what it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.thorough
def test_the_demonstration_of_a_revert_shows_both_sides() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "demo_revert.py")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plain, _, kept = done.stdout.partition("2. ckptmgr")
    assert "virsh -q snapshot-revert plain good" in plain
    assert "the next backup is a full one" in plain
    assert "It runs on" in kept
    assert "that is what the VM wrote" in kept
