"""What every planner refuses before anything is touched."""

from __future__ import annotations

from ..domain.disk import DiskLayers, Layer
from ..errors import BitmapBroken, CheckpointExists, OperationFailed, Unsupported
from .request import CreateRequest
from .steps import Server, TcpServer

SOCKET_MAX = 107
"""Bytes of a unix socket's path: sun_path of unix(7) is 108 with the final NUL."""


def check_server(server: Server | None) -> Server:
    """Where NBD can be served to us.  Raises Unsupported."""
    if server is None:
        raise Unsupported(
            "dirty bitmaps cannot be read here: there is no folder for a socket that both QEMU "
            "and ckptmgr can reach",
            hint="run ckptmgr on the hypervisor (socket_directory in ckptmgr.toml names another "
            "folder), or set nbd_address there to read over the network",
        )
    return server if isinstance(server, TcpServer) else check_socket(server)


def check_socket(path: Server | None) -> str:
    """The path of the socket, if a unix socket can have it.  Raises Unsupported."""
    path = path if isinstance(path, str) else check_server(path)
    if isinstance(path, TcpServer):
        raise Unsupported(
            "engine 'monitor' reads dirty bitmaps through a unix socket of the hypervisor alone",
            hint="run ckptmgr on the hypervisor",
        )
    length = len(path.encode())
    if length > SOCKET_MAX:
        raise Unsupported(
            f"the path of the socket to read dirty bitmaps through has {length} bytes, and "
            f"{SOCKET_MAX} are possible: {path}",
            hint="use a shorter directory for the embedded root or socket_directory",
        )
    return path


def top_layer(target: str, layers: DiskLayers | None) -> Layer:
    """The layer that the guest writes to.  Raises OperationFailed where it was not looked at."""
    if layers is None or not layers.layers:
        raise OperationFailed(f"nothing is known of the images of disk {target}")
    return layers.layers[0]


def check_name_free(request: CreateRequest) -> None:
    """Raises CheckpointExists if any layer of a disk has a bitmap of the checkpoint's name.

    One in a deeper layer would be taken for a part of the new one (libvirt's rule for chains
    counts every contiguous layer that has the name).
    """
    for disk in request.disks:
        for layer in disk.layers.holding(request.name) if disk.layers else ():
            raise CheckpointExists(
                f"disk {disk.target} has a bitmap called {request.name!r} already, "
                f"in {layer.image}",
                hint="choose another name for the checkpoint",
            )


def check_readable(target: str, since: str, layers: DiskLayers) -> tuple[Layer, ...]:
    """The layers whose bitmaps called `since` together say what changed.  Raises BitmapBroken."""
    broken = layers.broken(since)
    if broken is not None:
        raise BitmapBroken(
            f"the bitmap {since!r} of disk {target} cannot be used: it is {broken}", disk=target
        )
    return layers.holding(since)


def finest(name: str, layers: tuple[Layer, ...]) -> int:
    """The finest granularity among the bitmaps called `name` on `layers`, in bytes."""
    found = (layer.bitmap(name) for layer in layers)
    return min(bitmap.granularity for bitmap in found if bitmap is not None)
