"""What is served over NBD, and where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Export:
    """A dirty bitmap to be read over NBD.

    disk -- the disk's target
    name -- the NBD export's name
    bitmap -- the bitmap's name; the metadata context is ``qemu:dirty-bitmap:<bitmap>``
    granularity -- of the bitmap, in bytes; None where it is not known
    """

    disk: str
    name: str
    bitmap: str
    granularity: int | None = None

    @property
    def context(self) -> str:
        """The NBD metadata context, as in QEMU's docs/interop/nbd.txt."""
        return f"qemu:dirty-bitmap:{self.bitmap}"


@dataclass(frozen=True)
class TcpServer:
    """libvirt's own NBD export of a running domain, reached over the network.

    host, port -- what the hypervisor's QEMU binds to, and where we connect
    tls -- both sides prove who they are (X.509), and nobody else can read
    certificates -- folder of ours with ca-cert.pem, client-cert.pem and client-key.pem; None:
        where libnbd looks
    """

    host: str
    port: int
    tls: bool = True
    certificates: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'nbds' if self.tls else 'nbd'}://{host}:{self.port}"


Server = str | TcpServer
"""Where NBD is served: the path of a unix socket, or an address."""
