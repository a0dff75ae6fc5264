"""A domain's disks, as libvirt's XML and the images tell: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Encryption:
    """How QEMU encrypts an image.

    format -- luks; qcow, which is AES in old qcow2 images; or what a newer libvirt has
    secret -- ``("uuid", …)`` or ``("usage", …)`` of libvirt's secret; None: none is named
    """

    format: str
    secret: tuple[str, str] | None = None


@dataclass(frozen=True)
class Image:
    """One layer of a disk's backing chain.

    type -- libvirt's source type: file, block, network, volume, nvme, vhostuser, dir
    source -- path, or URI for what has none (``rbd://host/pool/image``, ``volume:pool/name`` until
        its pool was asked);
              this is how an image is named in messages and in the store
    path -- local path where there is one (file, block; volumes are resolved through libvirt)
    format -- driver format (qcow2, raw, ...); None where unknown
    index -- libvirt's index attribute; node names are ``libvirt-<index>-format`` / ``-storage``
    data_file -- path of a qcow2's external data file
    qcow2_version -- 2 or 3 for a qcow2 image whose header could be read, else None
    cluster_size -- of a qcow2 image whose header could be read, in bytes
    size -- virtual size in bytes, where the image could be asked
    encryption -- None: it is not encrypted, as far as the definition and its header say
    slice_size -- only so many bytes of the file or device are the image (libvirt's <slices>)
    """

    type: str
    source: str
    path: str | None = None
    format: str | None = None
    index: int | None = None
    data_file: str | None = None
    qcow2_version: int | None = None
    cluster_size: int | None = None
    slice_size: int | None = None
    size: int | None = None
    encryption: Encryption | None = None


@dataclass(frozen=True)
class Disk:
    """One disk of a domain.

    target -- ``vda``
    device -- disk, lun, cdrom or floppy
    alias -- libvirt's alias of the running device (``virtio-disk0``), None when inactive
    chain -- images, top first; empty for an empty drive
    size -- virtual size in bytes, None where it could not be learnt
    chain_known -- `chain` ends at the base image; False: there may be more below its last layer
    """

    target: str
    bus: str
    device: str = "disk"
    alias: str | None = None
    chain: tuple[Image, ...] = ()
    read_only: bool = False
    transient: bool = False
    shareable: bool = False
    size: int | None = None
    chain_known: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is no medium."""
        return not self.chain

    @property
    def top(self) -> Image:
        """The image that the guest writes to.  Raises IndexError for an empty drive."""
        return self.chain[0]

    @property
    def encrypted(self) -> bool:
        """Whether an image of it is: what QEMU reads of it is not."""
        return any(image.encryption is not None for image in self.chain)

    @property
    def format_node(self) -> str | None:
        """Node name of the top image on a running blockdev domain, where it is sure without QMP.

        libvirt calls it ``libvirt-<index>-format``; over raw images newer ones have no such node.
        """
        if self.empty or self.top.index is None or self.top.format in ("raw", None):
            return None
        return f"libvirt-{self.top.index}-format"


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap as QEMU or the image reports it.

    count -- dirty bytes, rounded up to granules; None where only the image was asked
    """

    name: str
    granularity: int
    recording: bool
    persistent: bool = True
    inconsistent: bool = False
    busy: bool = False
    count: int | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of a disk with the bitmaps found on it.

    node -- block node (running domains), image -- path or URI, size -- virtual size in bytes
    """

    image: str
    node: str | None = None
    format: str | None = None
    size: int | None = None
    read_only: bool = False
    bitmaps: tuple[Bitmap, ...] = ()

    def bitmap(self, name: str) -> Bitmap | None:
        """The bitmap called `name` on this layer, or None."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True)
class DiskLayers:
    """A disk's backing chain with its bitmaps, top first."""

    target: str
    layers: tuple[Layer, ...] = field(default=())

    def holding(self, name: str) -> tuple[Layer, ...]:
        """The layers that have a bitmap called `name`, whatever its state."""
        return tuple(layer for layer in self.layers if layer.bitmap(name) is not None)

    def broken(self, name: str) -> str | None:
        """Why "since `name`" cannot be answered from the bitmaps, or None if it can.

        libvirt's rule (qemuBlockBitmapChainIsValid) -- on the top layer, contiguous downwards,
        each one recording and consistent -- and what it leaves out: layers that hold the
        bitmap have one size, or else it cannot be merged across them.
        """
        holding = self.holding(name)
        if not holding:
            return "missing"
        if self.layers[: len(holding)] != holding:
            return "not on the top layer, or with a gap in the backing chain"
        for layer in holding:
            bitmap = layer.bitmap(name)
            assert bitmap is not None  # noqa: S101 -- holding() found it
            if bitmap.inconsistent:
                return f"inconsistent in {layer.image}"
            if not bitmap.recording:
                return f"not recording in {layer.image}"
            if layer.size != holding[0].size:
                return f"{layer.image} has another size than the disk"
        return None
