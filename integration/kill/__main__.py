"""``python -m integration.kill``: the warm process."""

import importlib
import pkgutil

import ckptmgr

from .warm import main

# Much is imported only when it is needed; here, everything is.
for module in pkgutil.walk_packages(ckptmgr.__path__, "ckptmgr."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
main()
