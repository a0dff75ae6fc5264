"""``python -m ckptmgr.hook STORE UUID HOW CONFIG < DOMAIN.xml``, as the script calls it.

Says what it did on standard error and in the system's log, and exits with 0 whatever happens.
"""

from __future__ import annotations

import sys
import syslog
from contextlib import suppress
from pathlib import Path

from ..errors import CkptmgrError, InvalidDocument
from ..store import Store
from .departure import INPUT_MAX, How, Start, leave


def main(arguments: list[str]) -> int:
    """Look at a start, and do what a revert needs."""
    try:
        store, uuid, how, config = arguments
        folder = Store(Path(store)).domain(uuid)
        start = Start(sys.stdin.buffer.read(INPUT_MAX), How(how), Path(config))
        said = leave(folder, start)
    except InvalidDocument:
        return 0  # whatever it is, it is not ours
    except (CkptmgrError, OSError, ValueError, ImportError) as error:
        said = f"a revert was left alone: {error}"
    if said:
        text = f"ckptmgr: domain {arguments[1] if len(arguments) > 1 else '?'}: {said}"
        syslog.syslog(syslog.LOG_NOTICE, text)
        if sys.stderr is not None:  # closed
            with suppress(OSError):
                print(text, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
