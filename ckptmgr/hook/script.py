"""The shell script in libvirt's folder: cheap for ordinary starts, and never in the way.

What it goes by, seen on libvirt 9.0:

- the marker in the domain's XML is not that of the store: an older one was brought back;
- a QEMU that ran was ended by an operation that holds libvirt's "start" job: a revert (`destroy`
  has a job of its own, a failed start has the reason "starting up");
- the XML has ``<backingStore>``, which definitions of running domains have: a snapshot was loaded
  by a domain that was off.

None of these says so for certain but the first two; `departure` looks closer.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD = "#!/bin/sh\n# ckptmgr hook "
"""How every version of the script begins."""

VERSION = 1

STOPPED = ".stopped"
"""In a domain's folder of the store: how its QEMU ended, and its XML then."""


@dataclass(frozen=True)
class Setting:
    """What the script is told.

    store -- the metadata directory
    python, package -- the interpreter, and the folder that the package ckptmgr is in
    """

    store: Path
    python: Path
    package: Path


def script(setting: Setting) -> str:
    """The text of the script."""
    names = {
        "VERSION": str(VERSION),
        "STORE": shlex.quote(str(setting.store)),
        "PYTHON": shlex.quote(str(setting.python)),
        "PACKAGE": shlex.quote(str(setting.package)),
        "STOPPED": STOPPED,
    }
    text = _SCRIPT
    for name, value in names.items():
        text = text.replace(f"@{name}@", value)
    return text


# dash scans for ${x#*y} in time that is quadratic: hence only in the first 2000 bytes.  `true` and
# printf where ":" would do, because a failed redirection of a special built-in ends the shell.
_SCRIPT = r"""#!/bin/sh
# ckptmgr hook @VERSION@
# Keeps the history of checkpoints right when a snapshot is reverted by other tools.
# Written by `ckptmgr hook install`; `ckptmgr hook uninstall` removes it.

case $2/$3 in
prepare/begin | stopped/end | restore/begin) ;;
*) exit 0 ;;
esac

# Whatever happens here is no reason to keep a domain from starting.
trap 'exit 0' EXIT
exec 2>&1
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 077

store=@STORE@
python=@PYTHON@
package=@PACKAGE@
run=/run/libvirt/qemu

# The domain: as it was, or as it is about to be started.
xml=$(timeout 10 head -c 4194304 2>/dev/null)
case $xml in
'<domain '*) ;;
*) exit 0 ;;
esac
top=$(printf '%.2000s' "$xml")
uuid=${top#*'<uuid>'}
uuid=${uuid%%'<'*}
case $uuid in
*[!0-9a-f-]*) exit 0 ;;
????????-????-????-????-????????????) ;;
*) exit 0 ;;
esac
folder=$store/$uuid
[ -f "$folder/domain.json" ] || exit 0
note=$folder/@STOPPED@

case $2 in
restore)
    echo restore >"$note"
    exit 0
    ;;
stopped)
    how=stop
    status=$(cat "$run/$1.xml" 2>/dev/null)
    case $status in
    *"reason='starting up'"*) ;;
    *'<job '*" async='start'"*) how=revert ;;
    esac
    printf '%s\n%s\n' "$how" "$xml" >"$note"
    exit 0
    ;;
esac

# prepare begin
how=
[ -r "$note" ] && read -r how <"$note"
if [ "$how" != restore ]; then
    current= generation=
    while read -r key value; do
        case $key in
        '"current":') current=${value%,} ;;
        '"generation":') generation=${value%,} ;;
        '"tails":') break ;;
        esac
    done <"$folder/domain.json"
    same=no
    if [ "$current" = null ]; then
        case $xml in
        *urn:ckptmgr:1*) ;;
        *) same=yes ;;
        esac
    else
        current=${current#\"}
        current=${current%\"}
        marker="<ckptmgr:current xmlns:ckptmgr=\"urn:ckptmgr:1\""
        marker="$marker checkpoint=\"$current\" generation=\"$generation\"/>"
        case $xml in
        *"$marker"*) same=yes ;;
        esac
    fi
    # A definition that was a running domain's, loaded by one that was off.
    if [ "$same" = yes ] && [ "$how" != revert ]; then
        case $xml in
        *'<backingStore'*) how=off ;;
        esac
    fi
    if [ "$same" = no ] || [ "$how" = revert ] || [ "$how" = off ]; then
        config=${0%/*}/../../qemu/$1.xml
        printf '%s' "$xml" | PYTHONPATH=$package timeout -k 5 60 \
            "$python" -P -m ckptmgr.hook "$store" "$uuid" "${how:-start}" "$config" >/dev/null
    fi
fi
printf '' >"$note"
exit 0
"""
