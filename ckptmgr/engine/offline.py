"""Execution of steps on the images of a domain that does not run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from ..checkpoint import EngineName
from ..domain.adapter import DomainAdapter
from ..nbd import read_dirty_map
from ..plan.steps import (
    Export,
    ImageBitmap,
    ImagesCheck,
    ImagesRelease,
    ImagesServe,
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

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Execute `steps`; see `Engine`."""
        return run_steps(self.name, steps, self.perform)

    def perform(self, step: Step, outcome: Outcome) -> None:
        """Execute one step."""
        match step:
            case ImagesCheck():
                for disk, image in step.images:
                    check_free(disk, image)
            case ImageBitmap():
                change_bitmap(step)
            case ReadImageMap():
                self._read(step, outcome)
            case ImagesServe():
                for disk, image, form in step.images:
                    server = self._servers.enter_context(serve_image(disk, image, form))
                    server.wait()
                    outcome.served[disk] = (server.socket, "")
            case ImagesRelease():
                self._servers.close()
            case _:
                self._libvirt.perform(step, outcome)

    def _read(self, step: ReadImageMap, outcome: Outcome) -> None:
        export = Export(step.disk, "", step.bitmap, step.granularity)
        with serve(step.disk, step.image, step.bitmap) as server:
            found = read_dirty_map(server.socket, export, check=server.check)
        outcome.add(step.disk, found)
