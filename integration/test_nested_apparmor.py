"""The system's libvirt under AppArmor, which confines the QEMU of each machine.

Only where ``vagrant/run-nested`` says in CKPTMGR_TEST_SAMPLE which VM of that libvirt may be used:
the tests' own libvirts have no security driver.  By the command line, for a process that has an
embedded libvirt open reaches no other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.stand.patience import patiently

pytestmark = pytest.mark.nested


@pytest.fixture
def sample() -> str:
    return os.environ["CKPTMGR_TEST_SAMPLE"]


@pytest.mark.scenario("AppArmor: a backup with a scratch file that QEMU makes")
def test_confined_qemu_makes_and_opens_all_that_a_backup_by_the_monitor_needs(
    sample: str, tmp_path: Path
) -> None:
    """Its repository is in a folder where QEMU may not be."""
    pid = Path(f"/run/libvirt/qemu/{sample}.pid").read_text()
    label = Path(f"/proc/{pid}/attr/current").read_text()
    assert label.startswith("libvirt-")
    assert label.rstrip("\0\n").endswith(" (enforce)")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ckptmgr", "-c", "qemu:///system", "--engine", "monitor"),
            *("backup", sample, private / "repository", "confined", "--disk", "vda"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patiently(120),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "confined\n"), done.stderr
