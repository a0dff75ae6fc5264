"""Three generations of libvirt and QEMU beside each other, each in a folder of its own.

``build`` debootstraps a release of Debian into the user's cache, once; ``Stack`` runs its
libvirtd, with the interface of the other stands (``integration.stand``).  To look around:

    python -m integration.stacks list
    python -m integration.stacks start debian11
"""

from .build import RELEASES, Release, build, built
from .stack import Stack

__all__ = ["RELEASES", "Release", "Stack", "build", "built"]
