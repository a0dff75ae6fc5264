"""Restore points outside the domain: the repository, what is in it, and how it is read and kept.

Nothing in here knows libvirt.  docs/repository.md describes the format.
"""
