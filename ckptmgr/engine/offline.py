"""Execution of steps on the images of a domain that does not run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from ..checkpoint import EngineName
from ..domain.adapter import DomainAdapter
from ..domain.devices import Watch, is_device
from ..domain.keys import Keys
from ..errors import Busy, OperationFailed, Unsupported
from ..nbd import read_dirty_map
from ..plan.steps import (
    Export,
    ImageBitmap,
    ImagesCheck,
    ImagesRelease,
    ImagesServe,
    ImagesUnchanged,
    ReadImageMap,
    Step,
)
from .base import Outcome, run_steps
from .libvirt import LibvirtEngine
from .qemu_img import change_bitmap, check_free, serve, serve_image


class OfflineEngine:
    """qemu-img and qemu-nbd; what concerns libvirt's metadata goes through its API."""

    name = EngineName.OFFLINE

    def __init__(self, adapter: DomainAdapter) -> None:
        self.adapter = adapter
        self._libvirt = LibvirtEngine(adapter)
        self._servers = ExitStack()
        self._keys = Keys(adapter)
        self._watches: dict[str, Watch] = {}

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Execute `steps`; see `Engine`."""
        return run_steps(self.name, steps, self.perform)

    def perform(self, step: Step, outcome: Outcome) -> None:
        """Execute one step."""
        match step:
            case ImagesCheck():
                for disk, image in step.images:
                    check_free(disk, image)
                    self._keys.of(disk, image)
                for disk, image in step.served:
                    self._served_key(disk, image)
            case ImageBitmap():
                self._change(step)
            case ReadImageMap():
                self._read(step, outcome)
            case ImagesServe():
                for disk, image, form in step.images:
                    if is_device(image):
                        self._watches[disk] = _watch(disk, image)
                    key = self._served_key(disk, image)
                    server = self._servers.enter_context(serve_image(disk, image, form, key=key))
                    server.wait()
                    outcome.served[disk] = (server.socket, "")
            case ImagesRelease():
                self._servers.close()
            case ImagesUnchanged():
                for disk, watch in self._watches.items():
                    _check_undisturbed(disk, watch)
                self._watches.clear()
            case _:
                self._libvirt.perform(step, outcome)

    def _change(self, step: ImageBitmap) -> None:
        if step.missing_ok and not os.path.lexists(step.image):
            return
        key = self._keys.of(step.disk, step.image)
        change_bitmap(step, key, alone=self._keys.below(step.disk, step.image))

    def _served_key(self, disk: str, image: str) -> bytes | None:
        """The key of an image that is to be served.  Raises Unsupported."""
        if self._keys.below(disk, image):
            raise Unsupported(
                f"disk {disk} of domain {self.adapter.name!r} stands on an image that is encrypted",
                hint="start the domain: while it runs, its QEMU has the keys",
            )
        return self._keys.of(disk, image)

    def _read(self, step: ReadImageMap, outcome: Outcome) -> None:
        export = Export(step.disk, "", step.bitmap, step.granularity)
        key = self._keys.of(step.disk, step.image)
        with serve(step.disk, step.image, step.bitmap, key) as server:
            found = read_dirty_map(server.socket, export, check=server.check)
        outcome.add(step.disk, found)


def _watch(disk: str, image: str) -> Watch:
    """Raises Busy, OperationFailed."""
    check_free(disk, image)
    try:
        return Watch(image)
    except OSError as error:
        raise _unreadable(disk, image, error) from error


def _check_undisturbed(disk: str, watch: Watch) -> None:
    """Raises Busy, OperationFailed."""
    try:
        disturbed = watch.is_disturbed()
    except OSError as error:
        raise _unreadable(disk, watch.path, error) from error
    if disturbed:
        raise Busy(
            f"{watch.path}, of disk {disk}, was opened or written while it was read, so what was "
            "read is of no one instant",
            hint="do it again while the domain stays shut off, or while it runs",
        )


def _unreadable(disk: str, image: str, error: OSError) -> OperationFailed:
    return OperationFailed(f"the image {image} of disk {disk} cannot be read: {error.strerror}")
