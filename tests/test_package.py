"""The package's face: everything is there, and nothing is loaded before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ckptmgr
from ckptmgr import errors


def test_importing_the_package_imports_no_dependency() -> None:
    code = "import sys, ckptmgr; print(ckptmgr.__version__, *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stdout.split())
    assert not {"libvirt", "lxml", "click", "rich", "nbd", "pyroaring"} & modules
    assert not {name for name in modules if name.startswith("ckptmgr.")} - {"ckptmgr._version"}


def test_every_error_is_exported() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.CkptmgrError)
    }
    assert classes <= set(ckptmgr.__all__)


@pytest.mark.parametrize("name", sorted(set(ckptmgr.__all__) - {"connect", "Host", "Domain"}))
def test_what_is_exported_is_there(name: str) -> None:
    assert getattr(ckptmgr, name) is not None
    assert name in dir(ckptmgr)


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'snapshots'"):
        _ = ckptmgr.snapshots
