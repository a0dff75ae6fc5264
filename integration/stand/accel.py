"""Whether KVM really works: /dev/kvm can be there and a guest hang at its first instruction."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

# A boot sector that leaves QEMU through isa-debug-exit: mov al, 0x2a; out 0xf4, al; hlt.
_SECTOR = bytes.fromhex("b02a e6f4 f4").ljust(510, b"\0") + b"\x55\xaa"
_STATUS = (0x2A << 1) | 1


def runs(accelerator: str, seconds: float) -> bool:
    """Whether a guest of a few instructions runs to its end on `accelerator` within `seconds`."""
    with tempfile.TemporaryFile() as sector:  # without a name: nothing is left if we are killed
        sector.write(_SECTOR.ljust(1 << 16, b"\0"))
        sector.flush()
        file = f"/proc/self/fd/{sector.fileno()}"
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
        command += ["-accel", accelerator, "-machine", "pc", "-m", "16"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        command += ["-drive", f"file={file},format=raw,if=ide,readonly=off"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(sector.fileno(),),
                timeout=seconds,
                check=False,
            )
        except (subprocess.TimeoutExpired, FileNotFoundError):
            return False
    return done.returncode == _STATUS


@functools.cache
def domain_type() -> str:
    """``kvm`` where a guest really runs on it, else ``qemu``.

    The environment variable CKPTMGR_TEST_ACCEL (``kvm`` or ``tcg``) decides without a trial.
    """
    chosen = os.environ.get("CKPTMGR_TEST_ACCEL")
    if chosen is not None:
        return {"kvm": "kvm", "tcg": "qemu"}[chosen]
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return "kvm" if usable and runs("kvm", seconds=2) else "qemu"


@functools.cache
def processor_is_emulated() -> bool:
    """Whether this machine's processor is QEMU's: what it has of SVM is in software then."""
    return "QEMU TCG CPU" in Path("/proc/cpuinfo").read_text()
