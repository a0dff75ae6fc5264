"""Commands run as an ordinary user of this machine, one that nobody is."""

from __future__ import annotations

import itertools
import os
import pwd
import subprocess
import sys
from pathlib import Path

from .libvirts import StandError
from .workspace import Workspace

CHECKOUT = Path(__file__).parents[2]

# In mount and pid namespaces of their own: /tmp is the user's, and has the checkout and Python in
# it, which may lie in a folder that only root can enter; no process outlives the command; and there
# is no /dev/kvm: one that cannot be opened makes libvirt try out QEMU at every call.
_ENTER = """\
set -e
home=$1 checkout=$2 python=$3 user=$4
shift 4
mount --bind "$checkout" "$home/checkout"
mount --bind "$python" "$home/python"
mount -t tmpfs -o mode=755 dev "$home/dev"
for node in null zero full random urandom; do
    : >"$home/dev/$node"
    mount --bind "/dev/$node" "$home/dev/$node"
done
mkdir -m 1777 "$home/dev/shm"
mkdir "$home/dev/pts"
mount --rbind /dev/pts "$home/dev/pts"
ln -s pts/ptmx "$home/dev/ptmx"
ln -s /proc/self/fd "$home/dev/fd"
for file in passwd group; do mount --bind "$home/$file" "/etc/$file"; done
mount --rbind "$home" /tmp
mount --rbind /tmp/dev /dev
cd /tmp/checkout
exec setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs --inh-caps=-all \
    --bounding-set=-all env -i HOME=/tmp/home TMPDIR=/tmp PATH="$PATH" LC_ALL=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    ${CKPTMGR_TEST_PATIENCE:+CKPTMGR_TEST_PATIENCE="$CKPTMGR_TEST_PATIENCE"} "$@"
"""

PYTHON = "/tmp/python/bin/python"


def run_as_ordinary_user(
    workspace: Workspace, *arguments: str, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run our Python with `arguments`, in the checkout, as a user of no rights.

    Raises StandError if we are not root.
    """
    if os.geteuid() != 0:
        raise StandError("only root can become another user")
    user = next(number for number in itertools.count(61000) if not _known(number))
    home = workspace.folder("u")
    home.chmod(0o755)
    for name in ("checkout", "python", "home", "dev"):
        (home / name).mkdir()
    for path in (home, home / "home"):
        os.chown(path, user, user)
    # libvirt wants to know whom it runs as
    for name, entry in (("passwd", f"{user}::/tmp/home:/bin/sh"), ("group", "")):
        known = Path("/etc", name).read_text()
        (home / name).write_text(f"{known}ordinary:x:{user}:{entry}\n")
    enter = ["sh", "-c", _ENTER, "sh", str(home), str(CHECKOUT), sys.prefix, str(user), PYTHON]
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run(
        [*apart, *enter, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def _known(number: int) -> bool:
    try:
        pwd.getpwuid(number)
    except KeyError:
        return False
    return True
