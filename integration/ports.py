"""TCP ports: one to listen on, and those that a process listens on, as the kernel knows them."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"

_kept: list[socket.socket] = []


def free_port() -> int:
    """A TCP port of the loopback interface for a server; nobody else is given it while we live.

    It stays bound.  The kernel gives such a one neither to another who asks for any port nor to a
    client (which could reach itself on it: then it would seem that somebody listens); but a server
    that asks for it with SO_REUSEADDR, as libvirt, QEMU and sshd do, may listen on it.
    """
    kept = socket.socket()
    _kept.append(kept)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port: int = kept.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Whether somebody listens on a port of the loopback interface."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def listening(pid: int) -> set[int]:
    """The ports, of every address, that process `pid` listens on just now.

    /proc/PID/net/tcp has a line for each socket of its network namespace, after a heading:

        0: 0100007F:2A39 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 96521 ...

    with the address and port in hexadecimal, the state (0A: it listens), and the inode.
    """
    process = Path("/proc", str(pid))
    sockets: set[str] = set()
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if found := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                sockets.add(found[1])
    ports = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN and words[9] in sockets:
                    ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


@contextlib.contextmanager
def watched(pid: int) -> Iterator[set[int]]:
    """Look at the ports of a process again and again; yields all that were seen until the end."""
    seen: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            seen.update(listening(pid))

    looker = threading.Thread(target=look, name="ports")
    looker.start()
    try:
        yield seen
    finally:
        ended.set()
        looker.join()
    seen.update(listening(pid))
