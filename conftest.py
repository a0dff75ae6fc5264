"""How hypothesis tries examples, in unit tests and on real libvirt alike."""

from __future__ import annotations

import os

from hypothesis import settings

# A machine may be slow and shared: no deadlines; and in CI the same examples in every run.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")
