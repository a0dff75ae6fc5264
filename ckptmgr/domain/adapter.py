"""DomainAdapter: the one place that knows libvirt's domain."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..errors import NodeUnknown, OperationFailed, Unsupported
from . import folders, nodes, support
from .agent import GuestAgent
from .binding import libvirt
from .bitmaps import parse_layers
from .chain import read_chain
from .connection import Connection
from .definition import without_secrets
from .details import described, located
from .disk import Disk, DiskLayers, Layer
from .disks import parse_capabilities, parse_disks
from .failure import translate
from .marker import Marker, read_marker, write_marker
from .monitor import CommandFailed, Monitor

log = logging.getLogger("ckptmgr")

IN_PLACE = 8_000_000
"""libvirts before that load a snapshot into the QEMU that runs, if they can."""


class DomainAdapter:
    """One domain: what it has and what it says; nothing is decided here.

    Every call asks libvirt anew.  All raise what `translate` makes of libvirt's errors.

    handle -- the virDomain
    connection -- the connection it was looked up on
    monitor, agent -- QEMU's monitor and the guest's agent
    """

    def __init__(self, connection: Connection, handle: Any) -> None:
        self.connection = connection
        self.handle = handle
        self.monitor = Monitor(handle, self.name, self.uuid)
        self.agent = GuestAgent(connection, handle)

    @classmethod
    def find(cls, connection: Connection, key: str) -> Self:
        """The domain with this id (if it runs), UUID or name.  Raises NoDomain."""
        return cls(connection, connection.lookup(key))

    @classmethod
    def define(cls, connection: Connection, definition: str) -> Self:
        """A new domain, from its XML.  Raises InvalidDocument, OperationFailed."""
        # Not validated: what another release of libvirt wrote need not be in this one's schema.
        with translate("defining the domain"):
            return cls(connection, connection.handle.defineXML(definition))

    @property
    def name(self) -> str:
        """The domain's name."""
        name: str = self.handle.name()
        return name

    @property
    def uuid(self) -> str:
        """The domain's UUID, in lower case with dashes."""
        uuid: str = self.handle.UUIDString()
        return uuid

    def active(self) -> bool:
        """Whether the domain runs (or is paused)."""
        with translate("asking whether it runs", self.name):
            return bool(self.handle.isActive())

    def persistent(self) -> bool:
        """Whether libvirt keeps the domain's definition when it stops."""
        with translate("asking whether it is persistent", self.name):
            return bool(self.handle.isPersistent())

    def has_saved_state(self) -> bool:
        """Whether the memory of its last run is kept, to go on from at the next start."""
        with translate("asking for a saved state", self.name):
            return bool(self.handle.hasManagedSaveImage(0))

    # --- what the XML says -------------------------------------------------------------------

    def _xml(self, flags: int = 0) -> str:
        with translate("reading the XML", self.name):
            text: str = self.handle.XMLDesc(flags)
        return text

    def definition(self, *, secure: bool = False) -> str:
        """The domain as the next start or a migration would take it.

        Of a running domain it is the inactive form of the *live* definition, as in libvirt's
        own checkpoints, so that it has the disks that the checkpoint has.

        secure -- with graphics passwords and the like; only for a place that is private
        """
        flags: int = libvirt.VIR_DOMAIN_XML_MIGRATABLE  # implies INACTIVE's form and SECURE
        if not self.active():
            flags |= libvirt.VIR_DOMAIN_XML_INACTIVE
        if self.connection.read_only and not secure:
            # MIGRATABLE is refused here, because of the secrets.
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE
        text = self._xml(flags)
        return text if secure else without_secrets(text)

    def description(self) -> str:
        """The domain's XML: the live one while it runs."""
        return self._xml(0 if self.active() else libvirt.VIR_DOMAIN_XML_INACTIVE)

    def disks(self, description: str | None = None) -> tuple[Disk, ...]:
        """The domain's disks in its order: the live ones while it runs.

        qcow2 headers and sizes are filled in where the images can be asked, and for an inactive
        domain the backing chain, if they are on this machine.

        description -- the domain's XML, where it was read just now
        """
        active = self.active()
        disks = parse_disks(description or self.description())
        return tuple(described(disk, self.handle, self.connection, active=active) for disk in disks)

    # --- blockdev, nodes and bitmaps ---------------------------------------------------------

    def _require_active(self, what: str) -> None:
        if not self.active():
            raise OperationFailed(
                f"domain {self.name!r} is not running: {what}", hint="start the domain"
            )

    def on_blockdev(self) -> bool:
        """Whether the running domain's disks are on -blockdev, as its XML tells; QEMU is asked
        (through the monitor) only where the XML does not.
        """
        self._require_active("there is no QEMU to ask about its disks")
        return self._on_blockdev(parse_disks(self._xml()))

    def _on_blockdev(self, disks: tuple[Disk, ...]) -> bool:
        told = nodes.on_blockdev(disks)
        if told is None:
            blocks = self.monitor.command("query-block")
            with self._named():
                told = nodes.on_blockdev(disks, blocks)
        return bool(told)

    def backup_support(self, description: str | None = None) -> tuple[bool, str]:
        """Whether libvirt's checkpoint and backup APIs work for this domain, and why (not).

        description -- the domain's XML, where it was read just now
        """
        text = description or self.description()
        with translate("asking for the domain capabilities", self.name):
            feature = self.connection.backup_feature(support.parse_machine(text))
        added, deleted = parse_capabilities(text)
        blockdev = nodes.on_blockdev(parse_disks(text)) if self.active() else None
        return support.backup_support(feature, added, deleted, blockdev)

    def nodes(self, targets: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
        """The node names of each layer, top first, by target; through the monitor.

        targets -- the disks asked for; None: every disk that has nodes

        Raises NodeUnknown for a disk whose nodes cannot be told for certain.
        """
        self._require_active("its disks have no block nodes")
        return self._nodes_and_reports(self._with_paths(), targets)[0]

    def layers(self, targets: Collection[str] | None = None) -> tuple[DiskLayers, ...]:
        """The backing chains with their dirty bitmaps, of the disks that have an image.

        Running: as QEMU has them now, through the monitor.  Inactive: as the images have them;
        a disk whose images are not on this machine has no layers here.

        targets -- the disks asked for; None: all
        """
        if self.active():
            disks = self._with_paths()
            found, named = self._nodes_and_reports(disks, targets)
            with self._named():
                return parse_layers(disks, found, named)
        return tuple(
            DiskLayers(disk.target, self._image_layers(disk))
            for disk in self.disks()
            if not disk.empty and (targets is None or disk.target in targets)
        )

    def _with_paths(self) -> tuple[Disk, ...]:
        """The live disks, without asking their images."""
        return tuple(
            replace(disk, chain=tuple(located(image, self.connection) for image in disk.chain))
            for disk in parse_disks(self._xml())
        )

    def _nodes_and_reports(
        self, disks: tuple[Disk, ...], targets: Collection[str] | None
    ) -> tuple[dict[str, tuple[str, ...]], list[dict[str, Any]]]:
        chosen = [
            disk
            for disk in disks
            if nodes.has_node(disk) and (targets is None or disk.target in targets)
        ]
        if not chosen:
            return {}, []
        if self._on_blockdev(disks):
            named = self._query_nodes()
            if targets is None:  # sd cards are on -drive: told only if asked for
                chosen = [disk for disk in chosen if disk.bus != "sd"]
            with self._named():
                return nodes.assigned_nodes(chosen, named), named
        blocks = self.monitor.command("query-block")
        stats = self.monitor.command("query-blockstats")
        named = self._query_nodes()
        wanted = [disk.target for disk in chosen]
        same = _same_file if self.connection.local else nodes.same_text
        with self._named():
            found = nodes.detect_nodes(disks, blocks, stats, named, wanted=wanted, same=same)
        return found, named

    def _query_nodes(self) -> list[dict[str, Any]]:
        try:
            answer = self.monitor.command("query-named-block-nodes", flat=True)
        except CommandFailed as error:
            if "flat" not in error.description:  # QEMU before 5.0
                raise
            answer = self.monitor.command("query-named-block-nodes")
        found: list[dict[str, Any]] = answer
        return found

    def _image_layers(self, disk: Disk) -> tuple[Layer, ...]:
        if not self.connection.local or disk.top.path is None:
            return ()
        try:
            layers = read_chain(disk.top.path, disk.top.format or "raw")
        except OperationFailed as error:
            if disk.read_only:
                return ()
            raise OperationFailed(
                f"domain {self.name!r}: disk {disk.target}: {error.message}", hint=error.hint
            ) from error
        if len(layers) != len(disk.chain):
            return layers
        return tuple(
            replace(layer, image=image.source)
            for layer, image in zip(layers, disk.chain, strict=True)
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the domain's name before the message of a pure function's error."""
        try:
            yield
        except (NodeUnknown, OperationFailed) as error:
            error.message = f"domain {self.name!r}: {error.message}"
            raise

    # --- marker, folders ---------------------------------------------------------------------

    def marker(self) -> Marker | None:
        """The marker in the domain's metadata, None if there is none.

        A libvirt that reverts in place puts back the definition, and not the metadata of the domain
        that runs: there it is the definition's marker that tells.
        """
        return read_marker(self.handle, self.name, defined=self.reverts_in_place())

    def reverts_in_place(self) -> bool:
        """Whether this libvirt loads a snapshot into the QEMU that runs, which may fail half way,
        and starts no new one.
        """
        with translate("asking for libvirt's version", self.name):
            return bool(self.connection.handle.getLibVersion() < IN_PLACE)

    def set_marker(self, marker: Marker | None) -> None:
        """Set the marker, live and in the configuration as the domain has them; None removes."""
        write_marker(self.handle, self.name, marker)

    def runtime_directory(self, override: Path | None = None) -> Path:
        """The folder where this domain's QEMU may bind a unix socket that we can connect to.

        libvirt's own ``domain-<id>-<short name>``, which security policies allow QEMU to write:
        ``ROOT/lib/qemu`` (embedded), ``/var/lib/libvirt/qemu`` (system), or
        ``$XDG_CONFIG_HOME/libvirt/qemu/lib`` (session).  libvirt has ``monitor.sock`` there, so
        a name of up to 12 characters fits into a socket's address.

        override -- take this folder instead, as in the settings

        Raises Unsupported, with the reason, where there is none.
        """
        if not self.connection.local:
            raise Unsupported(
                f"domain {self.name!r} runs on another machine: its QEMU's sockets are there",
                hint="run ckptmgr on the hypervisor",
            )
        hint = "set socket_directory in ckptmgr.toml to a folder that QEMU may write"
        if override is not None:
            return folders.accessible(override, self.name, hint)
        if self.connection.location.socket is not None:
            raise Unsupported(
                f"{self.connection.uri} names a socket of its own, so it cannot be told where that "
                "libvirt keeps its folders",
                hint=hint,
            )
        self._require_active("it has no folder for sockets")
        with translate("asking for the id", self.name):
            # A handle keeps the id that the domain had when it was looked up.
            number = self.connection.handle.lookupByUUIDString(self.uuid).ID()
        location = self.connection.location
        base = folders.library(location.driver, location.root)
        return folders.of_domain(base, number, self.name, hint)


def _same_file(one: str, other: str) -> bool:
    return nodes.same_text(one, other) or os.path.realpath(one) == os.path.realpath(other)
