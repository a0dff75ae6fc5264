"""Hosts with nested KVM for the tests, where this machine has no KVM: emulated as a whole.

``Image`` is what they boot from (vagrant/build-image.sh), ``Host`` is one that runs, and
``python -m integration.nested`` boots one, has vagrant/provision.sh set it up, and runs tests in
it whose machines are on KVM.
"""

from .host import Host, Image, Lan

__all__ = ["Host", "Image", "Lan"]
