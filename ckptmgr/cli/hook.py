"""The commands on libvirt's hook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answer import Answer, Document
from .arguments import FilePath, dry_run_option
from .checkpoints import planned
from .group import Subgroup
from .session import Command, Session
from .text import visible

if TYPE_CHECKING:
    from ..hook.script import Setting

_directory = click.option(
    "--directory",
    metavar="DIR",
    type=FilePath(file_okay=False),
    default=Path("/etc/libvirt/hooks"),
    show_default=True,
    help="libvirt's folder of hooks.",
)
_python = click.option(
    "--python",
    metavar="FILE",
    type=FilePath(),
    help="The Python that runs it (default: this one).",
)


@click.group("hook", cls=Subgroup, no_args_is_help=False)
def hook() -> None:
    """Protect the history from snapshots that other tools revert.

    The hook is called by libvirt when a domain starts. It archives the bitmaps that would keep
    QEMU from loading a snapshot, so that a plain virsh snapshot-revert works, and branches.
    """


@hook.command(cls=Command)
@_directory
@_python
@dry_run_option
@click.pass_obj
def install(session: Session, directory: Path, python: Path | None, dry_run: bool) -> Answer:
    """Install the hook, beside those that are there; print its path."""
    from ..checkpoint import EngineName
    from ..hook import installation
    from ..plan.steps import Direct, Plan

    setting = _setting(session, python)
    if dry_run:
        path = installation.place(directory)
        step = Direct(f"write the hook {path}, for the store {setting.store}")
        return planned(Plan(EngineName.OFFLINE, (step,), notes=(RELOAD,)))
    path = installation.install(directory, setting)
    return Answer(lambda: {"path": str(path)}, lambda _: [visible(str(path)), RELOAD])


RELOAD = "libvirt sees its first hook when it is reloaded: systemctl reload libvirtd (or virtqemud)"


@hook.command(cls=Command)
@_directory
@dry_run_option
@click.pass_obj
def uninstall(session: Session, directory: Path, dry_run: bool) -> Answer:
    """Remove the hook; others stay."""
    from ..checkpoint import EngineName
    from ..hook import installation
    from ..plan.steps import Direct, Plan

    if dry_run:
        path = installation.place(directory)
        steps = (Direct(f"remove the hook {path}"),) if path.exists() else ()
        return planned(Plan(EngineName.OFFLINE, steps))
    removed = installation.uninstall(directory)
    return Answer(
        lambda: {"removed": removed}, lambda _: ["removed" if removed else "not installed"]
    )


@hook.command(cls=Command)
@_directory
@_python
@click.pass_obj
def status(session: Session, directory: Path, python: Path | None) -> Answer:
    """Say whether the hook is installed, and which others are."""
    from ..hook import installation

    found = installation.status(directory, _setting(session, python))
    state = "not installed"
    if found.installed:
        state = "installed" if found.current else "installed, with other settings"

    def document() -> Document:
        return {
            "installed": found.installed,
            "current": found.current,
            "path": str(found.path),
            "others": list(found.others),
        }

    lines = [f"{visible(str(found.path))}: {state}"]
    lines += [f"another hook: {visible(path)}" for path in found.others]
    return Answer(document, lambda _: lines)


def _setting(session: Session, python: Path | None) -> Setting:
    from ..config import Driver, read_settings, settings_file, store_directory
    from ..hook.installation import setting

    # The hooks are those of the system's libvirt.
    place = (Driver.SYSTEM, None)
    store = session.store or store_directory(*place, read_settings(settings_file(*place)))
    return setting(store, python)


COMMANDS = (hook,)
