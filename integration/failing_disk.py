"""A disk of which some bytes cannot be read: an NBD server of our own, as a process.

    python -m integration.failing_disk IMAGE SOCKET DEFECTS

serves a raw image, read-only.  DEFECTS is a file that may be there or not: each line of it is an
offset, and what has that byte in it is answered with EIO, as by a disk with a sector that is lost.
QEMU's own servers end the connection then instead (7.2: "Failed to send reply"), and the QEMU that
reads would have lost the whole disk, and not a sector.

Of the protocol (NBD's doc/proto.md) there is the fixed newstyle negotiation without any option
but GO, and simple replies.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EINVAL, EIO
from pathlib import Path

from integration.stand.images import await_greeting

_MAGIC = 0x4E42444D41474943, 0x49484156454F5054  # NBDMAGIC, IHAVEOPT
_FIXED_NEWSTYLE = 1
_REPLY = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _INFORMATION, _UNSUPPORTED = 1, 3, (1 << 31) + 1
_READ_ONLY = 3  # and that there are flags
_READ, _DISCONNECT, _FLUSH = 0, 2, 3
_ANSWER = 0x67446698


class _Client:
    def __init__(self, connection: socket.socket, image: Path, defects: Path) -> None:
        self._stream = connection.makefile("rwb")
        self._image = image
        self._defects = defects
        self._size = image.stat().st_size

    def serve(self) -> None:
        with contextlib.suppress(ConnectionError, struct.error):
            if self._negotiated():
                self._answer()

    def _take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._stream.read(struct.calcsize(form)))

    def _give(self, form: str, *values: int, data: bytes = b"") -> None:
        self._stream.write(struct.pack(form, *values) + data)
        self._stream.flush()

    def _negotiated(self) -> bool:
        self._give(">QQH", *_MAGIC, _FIXED_NEWSTYLE)
        self._take(">I")
        while True:
            _, option, length = self._take(">QII")
            self._stream.read(length)
            if option == _EXPORT_NAME:
                self._give(">QH124x", self._size, _READ_ONLY)
                return True
            if option in (_INFO, _GO):
                self._give(">QIIIHQH", _REPLY, option, _INFORMATION, 12, 0, self._size, _READ_ONLY)
                self._give(">QIII", _REPLY, option, _ACK, 0)
                if option == _GO:
                    return True
            elif option == _ABORT:
                self._give(">QIII", _REPLY, option, _ACK, 0)
                return False
            else:
                self._give(">QIII", _REPLY, option, _UNSUPPORTED, 0)

    def _answer(self) -> None:
        with self._image.open("rb") as image:
            while True:
                _, _, kind, cookie, offset, length = self._take(">IHHQQI")
                error, data = 0, b""
                if kind == _DISCONNECT:
                    return
                if kind == _READ:
                    if any(offset <= each < offset + length for each in self._lost()):
                        error = EIO
                    else:
                        image.seek(offset)
                        data = image.read(length)
                elif kind != _FLUSH:
                    error = EINVAL
                self._give(">IIQ", _ANSWER, error, cookie, data=data)

    def _lost(self) -> list[int]:
        try:
            return [int(line) for line in self._defects.read_text().split()]
        except FileNotFoundError:
            return []


def _main(image: str, path: str, defects: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        Path(path).chmod(0o666)
        server.listen()
        while True:
            client = _Client(server.accept()[0], Path(image), Path(defects))
            threading.Thread(target=client.serve, daemon=True).start()


@dataclass
class FailingDisk:
    """A disk that is served; made by `failing_disk`.

    image -- the raw image with what it holds
    uri -- where it is served
    """

    image: Path
    uri: str
    _defects: Path

    def lose(self, *offsets: int) -> None:
        """From now on these bytes, and no others, cannot be read."""
        whole = self._defects.with_suffix(".new")
        whole.write_text("".join(f"{each}\n" for each in offsets))
        whole.rename(self._defects)


@contextlib.contextmanager
def failing_disk(folder: Path, content: bytes) -> Iterator[FailingDisk]:
    """Serve `content` as a disk, all of which can be read at first."""
    image, path, defects = (folder / name for name in ("lower.raw", "lower.sock", "defects"))
    image.write_bytes(content)
    command = [sys.executable, "-m", __name__, str(image), str(path), str(defects)]
    server = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    try:
        await_greeting(path, server)
        yield FailingDisk(image, f"nbd+unix:///?socket={path}", defects)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    _main(*sys.argv[1:])
