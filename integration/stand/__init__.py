"""The test stand: throw-away libvirts with small machines in them, and no trace afterwards.

``Workspace`` is the folder that everything lives in, ``Embedded`` and ``Daemon`` are two ways
to have a private libvirt, ``Machine`` is a domain of one of them with its images.
"""

from . import luks, starts
from .guest import Guest
from .images import MIB, DiskSpec, await_greeting, rounded
from .libvirts import Daemon, Embedded, Stand, StandError, System, private_mounts
from .machine import Machine
from .orphans import adopt
from .rest import await_rest
from .scratch import scratch
from .workspace import Workspace, reap

__all__ = [
    "MIB",
    "Daemon",
    "DiskSpec",
    "Embedded",
    "Guest",
    "Machine",
    "Stand",
    "StandError",
    "System",
    "Workspace",
    "adopt",
    "await_greeting",
    "await_rest",
    "luks",
    "private_mounts",
    "reap",
    "rounded",
    "scratch",
    "starts",
]
