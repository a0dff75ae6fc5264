"""The commands on snapshots."""

from __future__ import annotations

import click

from .answer import Answer, Document
from .arguments import domain_argument, dry_run_option, snapshot_argument, text
from .checkpoints import exclusive, named, planned
from .group import Subgroup
from .render import names, snapshot_list
from .session import Command, Session


@click.group("snapshot", cls=Subgroup, no_args_is_help=False)
def snapshot() -> None:
    """Take, list, revert to and delete libvirt snapshots.

    The history of checkpoints is kept right: a revert makes a branch of it.
    """


@snapshot.command(cls=Command)
@domain_argument
@click.argument("name", required=False, type=text)
@click.option("--description", metavar="T", type=text, help="A text to keep with the snapshot.")
@click.option(
    "--disk-only", is_flag=True, help="Without the memory of a running domain, in new files."
)
@click.option(
    "--memory",
    metavar="FILE",
    type=text,
    help="Keep the memory of a running domain in FILE, and the disks in new files.",
)
@click.option("--checkpoint", is_flag=True, help="With a checkpoint of the same instant.")
@dry_run_option
@click.pass_context
def create(
    context: click.Context,
    domain: str,
    name: str | None,
    description: str | None,
    disk_only: bool,
    memory: str | None,
    checkpoint: bool,
    dry_run: bool,
) -> Answer:
    """Take a snapshot.

    Prints its name, by default the time in seconds.
    """
    exclusive(context, {"--disk-only": disk_only, "--memory": memory is not None})
    session = context.ensure_object(Session)
    with session.domain(domain) as target:
        if dry_run:
            return planned(
                target.plan_create_snapshot(
                    name,
                    description=description,
                    disk_only=disk_only,
                    checkpoint=checkpoint,
                    memory=memory,
                )
            )
        taken = target.create_snapshot(
            name,
            description=description,
            disk_only=disk_only,
            checkpoint=checkpoint,
            memory=memory,
        )
    return Answer(
        lambda: {"domain": taken.domain.json(), **taken.json()}, lambda _: names([taken.name])
    )


@snapshot.command("list", cls=Command)
@domain_argument
@click.option("--name", "only_names", is_flag=True, help="Print names only.")
@click.pass_obj
def list_(session: Session, domain: str, only_names: bool) -> Answer:
    """List the snapshots of a domain.

    Each has the checkpoint that it comes after, which is where a revert to it branches off.
    """
    with session.domain(domain) as target:
        of = target.view
        found = target.snapshots()

    def document() -> Document:
        return {"domain": of.json(), "snapshots": [each.json() for each in found]}

    if only_names:
        return Answer(document, lambda _: names(each.name for each in found))
    return Answer(document, lambda terminal: snapshot_list(found, terminal))


@snapshot.command(cls=Command)
@domain_argument
@snapshot_argument
@click.option("--running", is_flag=True, help="Let the domain run afterwards.")
@click.option("--paused", is_flag=True, help="Leave the domain paused.")
@dry_run_option
@click.pass_context
def revert(
    context: click.Context, domain: str, name: str, running: bool, paused: bool, dry_run: bool
) -> Answer:
    """Go back to a snapshot.

    The state that comes back is a checkpoint, whose name is printed: the history goes on from
    there. By default the domain is then in the state that the snapshot has.
    """
    exclusive(context, {"--running": running, "--paused": paused})
    run = True if running else False if paused else None
    session = context.ensure_object(Session)
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_revert_snapshot(name, run=run))
        return named(target.revert_snapshot(name, run=run))


@snapshot.command(cls=Command)
@domain_argument
@snapshot_argument
@click.option("--children", is_flag=True, help="Delete those taken after it too.")
@click.option("--metadata", is_flag=True, help="Have libvirt forget it; keep what it holds.")
@dry_run_option
@click.pass_obj
def delete(
    session: Session, domain: str, name: str, children: bool, metadata: bool, dry_run: bool
) -> Answer:
    """Delete a snapshot; the checkpoints stay as they are.

    Prints the names of the snapshots that were deleted.
    """
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_delete_snapshot(name, children=children, metadata=metadata))
        of = target.view
        deleted = target.delete_snapshot(name, children=children, metadata=metadata)
    return Answer(lambda: {"domain": of.json(), "deleted": list(deleted)}, lambda _: names(deleted))


COMMANDS = (snapshot,)
