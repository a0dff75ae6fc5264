"""What was observed of one domain at one moment: data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..domain.disk import Disk, DiskLayers
from ..history import History
from ..marker import Marker
from ..store import Damage, DomainRecord, Intent


@dataclass(frozen=True)
class Known:
    """A checkpoint as libvirt lists it.

    disks -- those that it has a bitmap for
    refused -- why ckptmgr cannot take it over
    """

    name: str
    parent: str | None
    disks: frozenset[str]
    refused: str | None = None


@dataclass(frozen=True)
class Observation:
    """Everything that check looks at, of one moment.

    history -- as every command takes it; record -- as the store has it, which may have lost it
    aside -- names of checkpoints whose documents were moved aside
    maps -- digests of dirty maps that cannot be read, and why
    layers -- the bitmaps on each disk's layers; None where nobody could be asked
    blind -- the disks whose images cannot be read, and why
    held -- the disks with an image that another program is writing, and that image
    sized -- without layers: the disks of each checkpoint that libvirt says are valid
    known -- libvirt's list; told -- whether libvirt is to know of checkpoints at all
    no_marker -- why the marker that is there cannot be read
    job -- a backup job or NBD server of ours is running
    leftovers -- files of an interrupted operation
    """

    domain: str
    active: bool
    disks: tuple[Disk, ...]
    history: History
    record: DomainRecord
    damaged: tuple[Damage, ...] = ()
    aside: frozenset[str] = frozenset()
    maps: Mapping[str, str] = field(default_factory=dict)
    intent: Intent | None = None
    layers: Mapping[str, DiskLayers] | None = None
    blind: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    sized: Mapping[str, frozenset[str]] = field(default_factory=dict)
    known: tuple[Known, ...] = ()
    told: bool = True
    marker: Marker | None = None
    no_marker: str | None = None
    job: bool = False
    leftovers: tuple[str, ...] = ()

    @property
    def damaged_names(self) -> frozenset[str]:
        """Names of checkpoints whose documents cannot be used."""
        return frozenset(
            damage.path.stem for damage in self.damaged if damage.path.suffix == ".xml"
        )
