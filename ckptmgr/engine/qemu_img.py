"""qemu-img and qemu-nbd as child processes.

Images are named by ``json:`` pseudo file names, which take any path whole: commas, colons,
quotes, a leading dash (QEMU's bdrv_parse_filename and option parsers would cut them).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ..domain.devices import is_device
from ..domain.locks import in_use
from ..errors import (
    BitmapBroken,
    Busy,
    CheckpointExists,
    CkptmgrError,
    OperationFailed,
    Unsupported,
)
from .private import private_folder

if TYPE_CHECKING:
    from ..plan.steps import ImageBitmap

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_LOST = "Lost persistent bitmaps"

_KEY = "key"
"""Id of the object that gives a tool its key."""

STOP_TIMEOUT = 10.0
"""Seconds for qemu-nbd to end after SIGTERM, before SIGKILL (it only reads)."""


def image_name(path: str, driver: str = "qcow2", *, encrypted: bool = False, **options: Any) -> str:
    """How QEMU's tools are given the image at `path`.

    driver -- its format
    encrypted -- with LUKS; the tool is given the `_secret` as well
    options -- further blockdev options, ``backing=None`` for one without its backing file
    """
    # Where there is nothing, the tool will say so.
    protocol = "host_device" if is_device(path) else "file"
    if encrypted and driver == "raw":
        driver, options = "luks", {"key-secret": _KEY, **options}
    elif encrypted:
        options = {"encrypt": {"format": "luks", "key-secret": _KEY}, **options}
    image = {"driver": driver, "file": {"driver": protocol, "filename": path}, **options}
    return "json:" + json.dumps(image)


@contextlib.contextmanager
def _secret(key: bytes | None) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """The options that give QEMU's tools a key, and the descriptor that they have to inherit: it is
    neither in a command line nor in a file.
    """
    if key is None:
        yield [], ()
        return
    descriptor = os.memfd_create("ckptmgr", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, key)
        yield ["--object", f"secret,id={_KEY},file=/proc/self/fd/{descriptor}"], (descriptor,)
    finally:
        os.close(descriptor)


def check_free(disk: str, path: str) -> None:
    """See that the image can be written and that no QEMU program has it open, nor, if it is on a
    block device, any other.

    Asks for QEMU's own locks without taking them and without opening the image as qcow2, which
    would mark all its bitmaps as in use for a while.  Raises Busy, OperationFailed.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OperationFailed(
            f"the image {path} of disk {disk} cannot be written: {error.strerror}"
        ) from error
    try:
        held = in_use(descriptor)
    finally:
        os.close(descriptor)
    if held:
        raise _in_use(disk, path)


def _in_use(disk: str, path: str) -> Busy:
    return Busy(
        f"the image {path} of disk {disk} is in use elsewhere",
        hint="a running domain or a program such as qemu-nbd has it open; wait, or stop it",
    )


def change_bitmap(step: ImageBitmap, key: bytes | None = None, *, alone: bool = False) -> None:
    """Run ``qemu-img bitmap``.

    key -- of an encrypted image
    alone -- open the image without what it stands on

    Raises Busy, CheckpointExists, BitmapBroken, OperationFailed.
    """
    if step.missing_ok and not os.path.lexists(step.image):
        return
    if is_device(step.image):
        # Nothing would keep qemu-img from a device that a QEMU opened in a /dev of its own.
        check_free(step.disk, step.image)
    options = [f"--{step.action}"]
    if step.granularity is not None:
        options += ["-g", str(step.granularity)]
    # A checkpoint may be called "-f"; hence the "--".
    without: dict[str, Any] = {"backing": None} if alone else {}
    name = image_name(step.image, encrypted=key is not None, **without)
    with _secret(key) as (secret, inherited):
        command = ["qemu-img", "bitmap", *secret, *options, "--", name, step.bitmap]
        code, said = _run(command, inherited)
    if _LOST in said:
        # It ends with 0 (7.2): the bitmaps were not stored when the image was closed.
        raise OperationFailed(
            f"{step} of disk {step.disk} failed, and bitmaps that it had may be lost: {said}",
            hint="make room for the image, such as by a larger volume; `ckptmgr check` says what "
            "is lost",
        )
    if code == 0 or (step.missing_ok and "not found" in said and "Dirty bitmap" in said):
        return
    raise _failure(step, said)


def _failure(step: ImageBitmap, said: str) -> CkptmgrError:
    message = f"{step} of disk {step.disk} failed: {said}"
    if " lock" in said:
        return _in_use(step.disk, step.image)
    if "Bitmap already exists" in said:
        return CheckpointExists(message, hint="choose another name for the checkpoint")
    if "Dirty bitmap" in said and "not found" in said:
        return BitmapBroken(message, disk=step.disk)
    return OperationFailed(message)


def _run(command: list[str], inherited: tuple[int, ...] = ()) -> tuple[int, str]:
    """Exit status and standard error of a qemu-img that changes an image.

    It is never ended half way, for then all bitmaps of the image would be lost: it gets a session
    of its own, where Ctrl-C does not reach it, and is waited for however we leave.
    """
    with contextlib.ExitStack() as until_known:
        until_known.enter_context(_signals_later())
        process = _start(command, start_new_session=True, pass_fds=inherited)
        try:
            until_known.close()
            _, said = process.communicate()
        except BaseException:
            process.wait()
            raise
    return process.returncode, said.strip()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """What a signal would raise in the block is raised at its end.

    In a thread that is not the main one nothing is ever raised.
    """
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(each)
                if callable(handler):
                    handlers[each] = handler
                    signal.signal(each, lambda *arguments: came.append(arguments))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)


def _start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            **options,
        )
    except FileNotFoundError as error:
        raise Unsupported(
            f"{error.filename} is not installed, and the images of a domain that does not run "
            "cannot be changed without it",
            hint="install QEMU's tools (Debian: qemu-utils)",
        ) from error


def _ending_with_us() -> Callable[[], None]:
    """What a child does before its program, so that it ends when we do, even if we are killed.

    To begin with setpriv(1) instead would leave a moment in which our death goes unnoticed, and
    then a server that keeps the image locked for ever.  SIGKILL, because qemu-nbd forgets a SIGTERM
    that comes while it starts (7.2); it only reads.
    """
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


class _Server:
    """A qemu-nbd that ends with us, at the latest.

    socket -- where it listens, or soon will
    """

    def __init__(
        self,
        disk: str,
        image: str,
        options: list[str],
        name: str,
        folder: Path,
        key: bytes | None = None,
    ) -> None:
        self.socket = str(folder / "nbd.sock")
        self._disk = disk
        self._image = image
        with _secret(key) as (secret, inherited):
            given = [*secret, "--read-only", *options, f"--socket={self.socket}", "--", name]
            self._process = _start(
                ["qemu-nbd", *given], preexec_fn=_ending_with_us(), pass_fds=inherited
            )

    def wait(self) -> None:
        """Wait until the image is open, and so locked.  Raises as `check`, and OperationFailed."""
        from ..nbd import attempt

        attempt(self.socket, self._disk, self.check)

    def check(self) -> None:
        """Raises Busy or what `_failure` says if it has ended."""
        if self._process.poll() is None:
            return
        said = self._said()
        if " lock" in said:
            raise _in_use(self._disk, self._image)
        raise self._failure(said)

    def _failure(self, said: str) -> CkptmgrError:
        return OperationFailed(
            f"reading disk {self._disk} from {self._image} failed: {said or 'qemu-nbd ended'}"
        )

    def _said(self) -> str:
        stderr = self._process.stderr
        return "" if stderr is None else stderr.read().strip()

    def stop(self) -> None:
        """End it, and wait until it has let go of the image."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


_ServerT = TypeVar("_ServerT", bound=_Server)


class BitmapServer(_Server):
    """Serves one bitmap of one image; made by `serve`."""

    def __init__(self, disk: str, image: str, bitmap: str, folder: Path, key: bytes | None) -> None:
        self._bitmap = bitmap
        name = image_name(image, encrypted=key is not None, backing=None)
        # Without --persistent it ends with its first client.
        super().__init__(disk, image, [f"--bitmap={bitmap}"], name, folder, key)

    def _failure(self, said: str) -> CkptmgrError:
        message = (
            f"reading bitmap {self._bitmap!r} of disk {self._disk} from {self._image} failed: "
            f"{said or 'qemu-nbd ended'}"
        )
        if said.startswith("qemu-nbd: Bitmap"):
            return BitmapBroken(message, disk=self._disk)
        return OperationFailed(message)


class ImageServer(_Server):
    """Serves the content of an image; made by `serve_image`."""


@contextlib.contextmanager
def serve(disk: str, image: str, bitmap: str, key: bytes | None = None) -> Iterator[BitmapServer]:
    """Serve a bitmap on a socket in a folder that only we can enter.

    key -- of an encrypted image
    """
    with private_folder() as folder:
        yield from _stopped(BitmapServer(disk, image, bitmap, folder, key))


@contextlib.contextmanager
def serve_image(
    disk: str,
    image: str,
    driver: str = "qcow2",
    *,
    chain: bool = True,
    key: bytes | None = None,
) -> Iterator[ImageServer]:
    """Serve the content of an image on a socket in a folder that only we can enter.

    The export has no name.  The server may fail after this has returned: `ImageServer.check`.

    driver -- the format of the image
    chain -- as it reads on its backing files; False: what the image holds itself, and zeroes, with
             ``qemu:allocation-depth`` to tell them apart
    key -- of an encrypted image; what is served is not encrypted
    """
    options = ["--persistent", "--shared=4"]
    if not chain:
        options.append("--allocation-depth")
    without: dict[str, Any] = {} if chain else {"backing": None}
    name = image_name(image, driver, encrypted=key is not None, **without)
    with private_folder() as folder:
        yield from _stopped(ImageServer(disk, image, options, name, folder, key))


def _stopped(server: _ServerT) -> Iterator[_ServerT]:
    try:
        yield server
    finally:
        server.stop()
