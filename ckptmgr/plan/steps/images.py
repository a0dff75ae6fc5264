"""Steps on images that no QEMU has open: qemu-img and qemu-nbd."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImagesCheck:
    """See that images can be written and that nothing has them open, before any is changed.

    images -- (disk, path) each
    served -- (disk, path) of those that are only read: where one is encrypted, its key is there
    """

    images: tuple[tuple[str, str], ...]
    served: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(dict.fromkeys(image for _, image in self.images))
        return f"check that nothing uses {shown}"


@dataclass(frozen=True)
class ImageBitmap:
    """``qemu-img bitmap --<action> IMAGE BITMAP`` on a qcow2 image that nothing has open.

    action -- add, remove, clear, enable or disable
    granularity -- of a bitmap to add, in bytes; None: QEMU's default
    missing_ok -- a bitmap to remove need not be there, and nor need the image
    """

    disk: str
    image: str
    action: str
    bitmap: str
    granularity: int | None = None
    missing_ok: bool = False

    def __str__(self) -> str:
        return f"qemu-img: {self.action} bitmap {self.bitmap} in {self.image}"


@dataclass(frozen=True)
class ReadImageMap:
    """Read a bitmap of an image through qemu-nbd, which must be able to lock the image."""

    disk: str
    image: str
    bitmap: str
    granularity: int | None = None

    def __str__(self) -> str:
        return f"qemu-nbd: read bitmap {self.bitmap} of {self.disk} from {self.image}"


@dataclass(frozen=True)
class ImagesServe:
    """Serve images by qemu-nbd, read-only, all of them locked before any is read.

    images -- (disk, path, format) each
    """

    images: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        return f"qemu-nbd: serve the data of {', '.join(disk for disk, _, _ in self.images)}"


@dataclass(frozen=True)
class ImagesRelease:
    """End what `ImagesServe` began; where there is nothing, there is nothing to do."""

    def __str__(self) -> str:
        return "qemu-nbd: end"


@dataclass(frozen=True)
class ImagesUnchanged:
    """See that nobody wrote to the block devices that `ImagesServe` served, once that has ended.

    Its locks keep a QEMU from files, but not from devices: libvirt gives it nodes of its own.
    """

    def __str__(self) -> str:
        return "see that nobody wrote to what was read"
