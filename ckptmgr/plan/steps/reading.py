"""Steps at which what is served over NBD can be read."""

from __future__ import annotations

from dataclasses import dataclass

from .served import Export, Server, TcpServer


@dataclass(frozen=True)
class DataServed:
    """From here on the disks' data can be read: where, for whoever runs the plan.

    exports -- (disk, name of the export) each
    """

    socket: Server
    exports: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"nbd: the data of {', '.join(disk for disk, _ in self.exports)} is served"


@dataclass(frozen=True)
class ReadMaps:
    """Read dirty maps over NBD; unions where a disk occurs twice."""

    socket: Server
    exports: tuple[Export, ...]

    def __str__(self) -> str:
        disks = ", ".join(dict.fromkeys(export.disk for export in self.exports))
        where = f" from {self.socket}" if isinstance(self.socket, TcpServer) else ""
        return f"nbd: read the dirty map(s) of {disks}{where}"
