"""Directories and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.config import Driver, Settings, read_settings, settings_file, store_directory
from ckptmgr.errors import InvalidRequest

HOME = {"HOME": "/home/u"}


@pytest.mark.parametrize(
    ("driver", "root", "environment", "directory"),
    [
        (Driver.SYSTEM, None, HOME, "/var/lib/ckptmgr"),
        (Driver.SESSION, None, HOME, "/home/u/.local/state/ckptmgr"),
        (Driver.SESSION, None, {**HOME, "XDG_STATE_HOME": "/s"}, "/s/ckptmgr"),
        (
            Driver.SESSION,
            None,
            {**HOME, "XDG_STATE_HOME": "relative"},
            "/home/u/.local/state/ckptmgr",
        ),
        (Driver.EMBEDDED, "/r", HOME, "/r/lib/ckptmgr"),
        (Driver.EMBEDDED, "/r", {**HOME, "CKPTMGR_STORE": "/mine"}, "/mine"),
        (Driver.SYSTEM, None, {**HOME, "CKPTMGR_STORE": ""}, "/var/lib/ckptmgr"),
    ],
)
def test_each_driver_has_its_own_store(
    driver: Driver, root: str | None, environment: dict[str, str], directory: str
) -> None:
    assert store_directory(driver, Path(root) if root else None, environment) == Path(directory)


@pytest.mark.parametrize(
    ("driver", "root", "path"),
    [
        (Driver.SYSTEM, None, "/etc/ckptmgr.toml"),
        (Driver.SESSION, None, "/home/u/.config/ckptmgr.toml"),
        (Driver.EMBEDDED, "/r", "/r/etc/ckptmgr.toml"),
    ],
)
def test_settings_lie_beside_libvirts_own(driver: Driver, root: str | None, path: str) -> None:
    assert settings_file(driver, Path(root) if root else None, HOME) == Path(path)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml") == Settings()


def test_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ckptmgr.toml"
    file.write_text('store = "/srv/c"\nsocket_directory = "/run/c"\nlock_timeout = 5\n')
    assert read_settings(file) == Settings(Path("/srv/c"), Path("/run/c"), lock_timeout=5.0)


@pytest.mark.parametrize(
    "text",
    [
        "colour = 1",
        'store = "relative"',
        "store = 3",
        "lock_timeout = true",
        "lock_timeout = -1",
        'lock_timeout = "5"',
        "lock_timeout",
        "[store]\n",
        "\x00",
    ],
)
def test_a_wrong_setting_is_refused_and_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ckptmgr.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=r"ckptmgr\.toml"):
        read_settings(file)
