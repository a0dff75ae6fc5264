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
    place = driver, Path(root) if root else None
    assert store_directory(*place, Settings(), environment) == Path(directory)


@pytest.mark.parametrize("driver", Driver)
def test_the_setting_counts_unless_the_environment_names_a_store(driver: Driver) -> None:
    settings = Settings(store=Path("/srv/c"))
    assert store_directory(driver, Path("/r"), settings, HOME) == Path("/srv/c")
    chosen = {**HOME, "CKPTMGR_STORE": "/mine"}
    assert store_directory(driver, Path("/r"), settings, chosen) == Path("/mine")


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


def test_a_settings_file_can_be_named() -> None:
    chosen = {**HOME, "CKPTMGR_CONFIG": "/mine.toml"}
    assert settings_file(Driver.SYSTEM, None, chosen) == Path("/mine.toml")
    assert settings_file(Driver.EMBEDDED, Path("/r"), chosen) == Path("/mine.toml")


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml", {}) == Settings()


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(InvalidRequest, match=r"none\.toml cannot be read: No such file or direct"):
        read_settings(path, {"CKPTMGR_CONFIG": str(path)})


def test_no_port_is_opened_by_default_and_none_without_tls() -> None:
    assert Settings().nbd_address is None
    assert Settings().nbd_tls is True


def test_settings_for_reading_over_the_network(tmp_path: Path) -> None:
    file = tmp_path / "ckptmgr.toml"
    file.write_text(
        'nbd_address = "hv1.example"\nnbd_port = 10810\nnbd_tls = false\n'
        'nbd_certificates = "/pki"\nnbd_scratch = "/var/tmp"\n'
    )
    assert read_settings(file) == Settings(
        nbd_address="hv1.example",
        nbd_port=10810,
        nbd_tls=False,
        nbd_certificates=Path("/pki"),
        nbd_scratch=Path("/var/tmp"),
    )


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
        "lock_timeout = nan",
        "freeze_timeout = inf",
        "lock_timeout",
        "nbd_address = 1",
        'nbd_address = ""',
        'nbd_address = "a b"',
        "nbd_port = 0",
        "nbd_port = 65536",
        "nbd_port = true",
        "nbd_tls = 1",
        'nbd_certificates = "relative"',
        "[store]\n",
        "\x00",
    ],
)
def test_a_wrong_setting_is_refused_and_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ckptmgr.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=r"ckptmgr\.toml"):
        read_settings(file)
