"""Tests against a real libvirt and a real QEMU."""
