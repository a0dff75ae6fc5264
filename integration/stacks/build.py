"""Folders with a release of Debian, its libvirt and its QEMU; made once and kept in the cache.

~/.cache/ckptmgr/stacks/
  debian11.lock     held while it is built
  debian11/
    stamp.json      what the folder holds; a folder that holds something else is made anew
    root/           the release; never written after that
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ckptmgr.checkpoint import EngineName
from integration.stand import StandError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

PACKAGES = (
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "openssh-server",
    "qemu-system-x86",
    "qemu-utils",
)

# Folders of the root that are mounted over when it runs.
MOUNT_POINTS: tuple[str, ...] = ("dev", "proc", "sys", "run", "tmp", "etc/libvirt", "root")
MOUNT_POINTS += tuple(f"var/{name}/libvirt" for name in ("lib", "cache", "log"))

# libvirt's QEMU driver does not start as root without these; the numbers are Debian's.
ACCOUNTS = {
    "etc/group": ("kvm:x:64054:", "libvirt-qemu:x:64055:"),
    "etc/passwd": ("libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin",),
}

TIMEOUT = 1200

TRIES, PAUSE = 3, 10.0
"""How often what comes over the network is fetched until it is there, and the seconds between: a
mirror may close a connection.
"""


@dataclass(frozen=True)
class Release:
    """A release of Debian; `libvirt` and `qemu` are the versions that it has.

    engine -- that ckptmgr has to choose for a running domain there
    """

    suite: str
    libvirt: str
    qemu: str
    engine: EngineName


RELEASES: Mapping[str, Release] = {
    "debian11": Release("bullseye", "7.0", "5.2", EngineName.MONITOR),
    "debian12": Release("bookworm", "9.0", "7.2", EngineName.LIBVIRT),
    "debian13": Release("trixie", "11.3", "10.0", EngineName.LIBVIRT),
}


def cache() -> Path:
    """The folder that the stacks are kept in: ``$XDG_CACHE_HOME/ckptmgr/stacks``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ckptmgr" / "stacks"


def built(name: str) -> Mapping[str, str] | None:
    """Versions of the packages in the stack's folder; None if it has to be built."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        stamp = json.loads((cache() / name / "stamp.json").read_text())
        if stamp["recipe"] == _recipe(name):
            versions: dict[str, str] = stamp["versions"]
            return versions
    return None


def _recipe(name: str) -> Any:
    release = RELEASES[name]
    accounts = {file: list(lines) for file, lines in ACCOUNTS.items()}
    return [release.suite, release.libvirt, release.qemu, list(PACKAGES), accounts]


def build(name: str) -> Path:
    """The stack's root folder; debootstrapped if it is not there.  A minute, and network.

    Raises StandError where this machine has no means for it.
    """
    if built(name) is None:
        _require()
        cache().mkdir(parents=True, exist_ok=True)
        _build(name)
    return cache() / name / "root"


def hold(name: str) -> TextIO:
    """A file to close when a built stack is no longer used: until then it is not made anew."""
    lock = (cache() / f"{name}.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _build(name: str) -> None:
    with (cache() / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built(name) is None:
            for left in cache().glob(f".{name}-*"):
                shutil.rmtree(left)
            for again in reversed(range(TRIES)):
                try:
                    _build_once(name)
                    break
                except StandError:
                    if not again:
                        raise
                time.sleep(PAUSE)


def _build_once(name: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{name}-"))
    try:
        _make(name, folder)
        if (cache() / name).exists():
            (cache() / name).rename(folder / "old")
        (folder / "new").rename(cache() / name)
    finally:
        shutil.rmtree(folder)


def _require() -> None:
    if os.geteuid() != 0:
        raise StandError("only root can build and start another libvirt in a folder")
    if shutil.which("debootstrap") is None:
        raise StandError("debootstrap is not installed")
    if not KEYRING.exists():
        raise StandError(f"{KEYRING} is missing (Debian: debian-archive-keyring)")


def _make(name: str, folder: Path) -> None:
    """Make the stack in ``folder/new``."""
    root = folder / "new/root"
    root.parent.mkdir(mode=0o755)
    bootstrap = ["debootstrap", "--variant=minbase", f"--keyring={KEYRING}"]
    _run(name, root, [*bootstrap, RELEASES[name].suite, str(root)], [])
    # packages may start no service
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    # by apt: debootstrap itself, given these packages, unpacks trixie's in an impossible order
    install = ["chroot", str(root), "apt-get", "install", "--yes", "--quiet"]
    install += ["--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io"]
    install += ["-o", "Acquire::Retries=5"]  # bullseye's has none by itself
    _run(name, root, [*install, *PACKAGES], [f"--mount-proc={root}/proc"])
    _complete(root)
    stamp = {"recipe": _recipe(name), "versions": _versions(root)}
    (root.parent / "stamp.json").write_text(json.dumps(stamp, indent=1))


def _run(name: str, root: Path, command: list[str], mounts: list[str]) -> None:
    """Run a command that makes something of `root`; what it starts or mounts ends with it.

    mounts -- options of unshare: what is mounted beforehand
    """
    apart = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
    apart += ["--kill-child", *mounts]
    done = subprocess.run(
        [*apart, *command],
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        log = root / "debootstrap/debootstrap.log"
        details = log.read_text(errors="replace") if log.exists() else done.stdout
        raise StandError(f"{name} cannot be built: {details[-2000:].strip()}")


def _complete(root: Path) -> None:
    for point in MOUNT_POINTS:
        (root / point).mkdir(parents=True, exist_ok=True)
    for file, lines in ACCOUNTS.items():
        known = (root / file).read_text()
        accounts = {line.partition(":")[0] for line in known.splitlines()}
        new = [line for line in lines if line.partition(":")[0] not in accounts]
        (root / file).write_text(known + "".join(f"{line}\n" for line in new))
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()


def _versions(root: Path) -> dict[str, str]:
    show: list[str | Path] = [
        "dpkg-query",
        "--admindir",
        root / "var/lib/dpkg",
        "-W",
        "-f",
        "${Package} ${Version}\n",
    ]
    printed = subprocess.run([*show, *PACKAGES], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in printed.splitlines())
