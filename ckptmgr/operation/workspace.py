"""Where a running QEMU makes a socket and scratch files while its bitmaps are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Unsupported

if TYPE_CHECKING:
    from ..plan.steps import Server, TcpServer


@dataclass(frozen=True)
class Workspace:
    """Where QEMU may make a socket and scratch files, all called `prefix` and something.

    They lie in one folder without subfolders: AppArmor lets QEMU write just there.  `folder` is
    None where there is none: the domain does not run, or runs on another machine.  There `server`
    may be the address at which libvirt is to serve its bitmaps, and scratch files go to `far`.
    """

    folder: Path | None
    prefix: str
    server: TcpServer | None = None
    far: Path | None = None

    @property
    def address(self) -> Server | None:
        """Where QEMU is to serve NBD."""
        return self.socket if self.server is None else self.server

    @property
    def socket(self) -> str | None:
        """Path of the NBD server's unix socket."""
        return None if self.folder is None else str(self.folder / f"{self.prefix}.sock")

    def scratch(self, target: str) -> str | None:
        """Path of the scratch file of a disk's backup."""
        folder = self.folder or self.far
        return None if folder is None else str(folder / f"{self.prefix}-{target}.scratch")

    def files(self) -> tuple[Path, ...]:
        """What is there: while nothing is under way, an interrupted operation left it."""
        if self.folder is None:
            return ()
        found = self.folder.glob(f"{self.prefix}*")
        return tuple(sorted(path for path in found if path.suffix in (".sock", ".scratch")))

    def scratch_files(self) -> tuple[Path, ...]:
        """The scratch files that are there."""
        return tuple(path for path in self.files() if path.suffix == ".scratch")

    def clear(self) -> None:
        """Remove what is there.  Raises Unsupported where the folder cannot be used."""
        try:
            for path in self.files():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise Unsupported(
                f"{self.folder}, where dirty bitmaps are read through a socket, cannot be used: "
                f"{error.strerror}",
                hint="run as the user of the hypervisor, or set socket_directory in ckptmgr.toml",
            ) from error
