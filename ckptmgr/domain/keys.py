"""The keys of encrypted images, from libvirt's secrets, for when no QEMU has them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import CkptmgrError, ConnectionFailed, Unsupported
from . import images
from .binding import libvirt
from .disk import Disk, Encryption, Image
from .failure import translate

if TYPE_CHECKING:
    from .adapter import DomainAdapter


class Keys:
    """The keys of one domain's images; libvirt is asked for those that are needed, once."""

    def __init__(self, adapter: DomainAdapter) -> None:
        self._adapter = adapter
        self._known: dict[tuple[str, str], bytes] = {}

    def of(self, disk: str, path: str) -> bytes | None:
        """The key of an image of `disk`; None: it is not encrypted.

        Raises Unsupported where there is a key, and it cannot be had.
        """
        image = self._image(disk, path)
        if image.encryption is None:
            return None
        try:
            return self._secret(image.encryption)
        except Unsupported as error:
            error.message = (
                f"the image {path} of disk {disk} of domain {self._adapter.name!r} is encrypted, "
                f"and {error.message}"
            )
            error.hint = "start the domain: while it runs, its QEMU has the key"
            raise

    def below(self, disk: str, path: str) -> bool:
        """Whether an image that this one stands on is encrypted."""
        try:
            header = images.read_header(path)
        except OSError:
            return False  # whoever opens it will say so
        if header is not None and header.backing_file is None:
            return False  # as most are
        chain = self._disk(disk).chain
        paths = [image.path for image in chain]
        lower = chain[paths.index(path) + 1 :] if path in paths else ()
        return any(image.encryption is not None for image in lower)

    def _image(self, disk: str, path: str) -> Image:
        found = images.described(Image("file", path, path, "qcow2"))
        if found.qcow2_version is not None and found.encryption is None:
            return found  # as most are
        for image in self._disk(disk).chain:
            if image.path == path:
                return image
        return found

    def _disk(self, target: str) -> Disk:
        return next((disk for disk in self._disks if disk.target == target), Disk(target, ""))

    @cached_property
    def _disks(self) -> tuple[Disk, ...]:
        return self._adapter.disks()

    def _secret(self, encryption: Encryption) -> bytes:
        """Raises Unsupported, with the reason alone."""
        if encryption.format != "luks":
            raise Unsupported(f"in the format {encryption.format or '(unknown)'}")
        if encryption.secret is None:
            raise Unsupported("its definition names no secret of libvirt's")
        if encryption.secret not in self._known:
            kind, name = encryption.secret
            try:
                self._known[encryption.secret] = self._value(kind, name)
            except ConnectionFailed:
                raise
            except CkptmgrError as error:
                raise Unsupported(f"its secret {name} is not to be had: {error.message}") from error
        return self._known[encryption.secret]

    def _value(self, kind: str, name: str) -> bytes:
        handle = self._adapter.connection.handle
        with translate("asking for a secret"):
            if kind == "uuid":
                secret = handle.secretLookupByUUIDString(name)
            else:
                usage = libvirt.VIR_SECRET_USAGE_TYPE_VOLUME
                secret = handle.secretLookupByUsage(usage, name)
            value: bytes = secret.value()
        return value
