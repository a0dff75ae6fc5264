"""Snapshots and reverts, ours and those of others.

Each revert makes a branch, and no byte that differs is ever left out.  Whoever reverts, and
whatever else was done to the images meanwhile, is followed by a model (``Branches``) that has every
byte of every checkpoint.
"""
