"""The commands on checkpoints: create, list, show, current, parent, delete, redefine, adopt."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import CkptmgrError, InvalidDocument, NoCheckpoint
from .answer import Answer, Document
from .arguments import FilePath, checkpoint_argument, domain_argument, dry_run_option, text
from .candidates import complete_checkpoint, complete_disk
from .render import checkpoint_block, checkpoint_list, names, plan_lines
from .session import Command, Session
from .tree import tree

if TYPE_CHECKING:
    from ..plan.steps import Plan
    from ..views import CheckpointView

DOCUMENT_MAX = 16 * 1024 * 1024
"""No checkpoint's document comes near; a wrong file or an endless pipe does."""


@click.command(cls=Command)
@domain_argument
@click.argument("name", required=False, type=text)
@click.option("--description", metavar="T", type=text, help="A text to keep with the checkpoint.")
@click.option(
    "--disk",
    "specs",
    metavar="SPEC",
    multiple=True,
    type=text,
    shell_complete=complete_disk,
    help="A disk that takes part: vda, vda=no or vda=bitmap:NAME. May be repeated; "
    "disks that are not named are then left out.",
)
@click.option("--quiesce", is_flag=True, help="Freeze the guest's file systems meanwhile.")
@dry_run_option
@click.pass_obj
def create(
    session: Session,
    domain: str,
    name: str | None,
    description: str | None,
    specs: tuple[str, ...],
    quiesce: bool,
    dry_run: bool,
) -> Answer:
    """Make a checkpoint of all disks at one instant.

    Prints the checkpoint's name, by default the time in seconds.
    """
    from ..align import parse_disk_spec
    from ..checkpoint import check_name

    disks = [parse_disk_spec(spec) for spec in specs]
    if name is not None:
        check_name(name)
    with session.domain(domain) as target:
        if dry_run:
            return planned(
                target.plan_create(name, description=description, disks=disks, quiesce=quiesce)
            )
        return named(target.create(name, description=description, disks=disks, quiesce=quiesce))


@click.command("list", cls=Command)
@domain_argument
@click.option("--tree", "as_tree", is_flag=True, help="Draw the tree.")
@click.option("--name", "only_names", is_flag=True, help="Print names only.")
@click.option("--parent", "parents", is_flag=True, help="Add a column with the parents.")
@click.option("--roots", is_flag=True, help="Only checkpoints without parent.")
@click.option("--leaves", is_flag=True, help="Only checkpoints without children.")
@click.option("--no-leaves", is_flag=True, help="Only checkpoints with children.")
@click.option(
    "--from",
    "start",
    metavar="C",
    type=text,
    shell_complete=complete_checkpoint,
    help="Only the children of C.",
)
@click.option("--descendants", is_flag=True, help="With --from: all descendants of C.")
@click.option("--topological", is_flag=True, help="Parents before children, not by name.")
@click.pass_context
def list_(
    context: click.Context,
    domain: str,
    as_tree: bool,
    only_names: bool,
    parents: bool,
    roots: bool,
    leaves: bool,
    no_leaves: bool,
    start: str | None,
    descendants: bool,
    topological: bool,
) -> Answer:
    """List the checkpoints of a domain.

    The options are those of virsh checkpoint-list. With --tree, --from C draws C and all that
    came after it; the tree also shows the snapshots and where the domain is now.
    """
    exclusive(context, {"--tree": as_tree, "--name": only_names, "--parent": parents})
    exclusive(context, {"--leaves": leaves, "--no-leaves": no_leaves})
    for filtering in ({"--roots": roots}, {"--leaves": leaves}, {"--no-leaves": no_leaves}):
        exclusive(context, {"--tree": as_tree, **filtering})
    exclusive(context, {"--roots": roots, "--from": start is not None})
    if descendants and start is None:
        raise click.UsageError("--descendants needs --from", context)

    session = context.ensure_object(Session)
    with session.domain(domain) as target:
        view = target.checkpoints(
            roots=roots,
            leaves=True if leaves else False if no_leaves else None,
            start=start,
            descendants=descendants or (as_tree and start is not None),
            topological=topological,
            snapshots=as_tree,
        )
        if as_tree and start is not None:
            view = replace(view, checkpoints=(target.checkpoint(start), *view.checkpoints))
    if as_tree:
        return Answer(view.json, lambda terminal: tree(view, terminal))
    if only_names:
        return Answer(view.json, lambda _: names(each.name for each in view.checkpoints))
    return Answer(view.json, lambda terminal: checkpoint_list(view, terminal, parents=parents))


@click.command(cls=Command)
@domain_argument
@checkpoint_argument("name")
@click.option("--xml", is_flag=True, help="Print the document that libvirt would take.")
@click.option("--size", "sizes", is_flag=True, help="Add what was written since.")
@click.pass_obj
def show(session: Session, domain: str, name: str, xml: bool, sizes: bool) -> Answer:
    """Show one checkpoint."""
    with session.domain(domain) as target:
        view = target.checkpoint(name, size=sizes)
        if xml:
            document = target.document(name, size=sizes)
            return Answer(
                lambda: view.json() | {"xml": document}, lambda _: [document.removesuffix("\n")]
            )
    return Answer(view.json, lambda terminal: checkpoint_block(view, terminal, sizes=sizes))


@click.command(cls=Command)
@domain_argument
@click.option("--exists", is_flag=True, help="Print yes or no, and exit with 0 or 3.")
@click.pass_obj
def current(session: Session, domain: str, exists: bool) -> Answer:
    """Print the name of the current checkpoint."""
    with session.domain(domain) as target:
        if exists:
            there = target.has_current()
            return Answer(
                lambda: {"exists": there},
                lambda _: ["yes" if there else "no"],
                status=0 if there else NoCheckpoint.exit_status,
            )
        view = target.current()
        if view is None:
            raise NoCheckpoint(f"domain {target.view.name!r} has no current checkpoint")
    return named(view)


@click.command(cls=Command)
@domain_argument
@checkpoint_argument("name")
@click.pass_obj
def parent(session: Session, domain: str, name: str) -> Answer:
    """Print the name of a checkpoint's parent."""
    with session.domain(domain) as target:
        return named(target.parent(name))


@click.command(cls=Command)
@domain_argument
@checkpoint_argument("name")
@click.option("--children", is_flag=True, help="Delete all its descendants too.")
@click.option("--children-only", is_flag=True, help="Delete all its descendants, but not itself.")
@click.option("--metadata", is_flag=True, help="Forget it in libvirt and the store; keep bitmaps.")
@dry_run_option
@click.pass_context
def delete(
    context: click.Context,
    domain: str,
    name: str,
    children: bool,
    children_only: bool,
    metadata: bool,
    dry_run: bool,
) -> Answer:
    """Delete a checkpoint.

    What changed before it and after it is merged, so that differences between the others stay
    as they are. Prints the names of the checkpoints that were deleted.
    """
    exclusive(context, {"--children": children, "--children-only": children_only})
    session = context.ensure_object(Session)
    with session.domain(domain) as target:
        if dry_run:
            return planned(
                target.plan_delete(
                    name, children=children, children_only=children_only, metadata=metadata
                )
            )
        of = target.view
        deleted = target.delete(
            name, children=children, children_only=children_only, metadata=metadata
        )
    return Answer(lambda: {"domain": of.json(), "deleted": list(deleted)}, lambda _: names(deleted))


@click.command(cls=Command)
@domain_argument
@click.argument("file", type=FilePath(allow_dash=True))
@click.option(
    "--validate",
    is_flag=True,
    help="See first that its bitmaps are there and whole.",
)
@dry_run_option
@click.pass_obj
def redefine(session: Session, domain: str, file: Path, validate: bool, dry_run: bool) -> Answer:
    """Bring a checkpoint back from its XML, and print its name.

    FILE has the document that 'show --xml' or virsh printed; - is standard input.
    """
    document = _read_document(file)
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_redefine(document, validate=validate))
        return named(target.redefine(document, validate=validate))


@click.command(cls=Command)
@domain_argument
@dry_run_option
@click.pass_obj
def adopt(session: Session, domain: str, dry_run: bool) -> Answer:
    """Take over checkpoints that only libvirt knows.

    Prints their names.
    """
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_adopt())
        of = target.view
        adopted = target.adopt()

    def document() -> Document:
        return {"domain": of.json(), "checkpoints": [view.json() for view in adopted]}

    return Answer(document, lambda _: names(view.name for view in adopted))


def named(view: CheckpointView) -> Answer:
    """The answer of a command that makes or finds one checkpoint."""
    return Answer(view.json, lambda _: names([view.name]))


def planned(plan: Plan) -> Answer:
    """The answer of ``--dry-run``."""

    def document() -> Document:
        return {
            "dry_run": True,
            "engine": plan.engine.value,
            "steps": plan.lines(),
            "notes": list(plan.notes),
        }

    return Answer(document, lambda terminal: plan_lines(plan, terminal))


def exclusive(context: click.Context, options: dict[str, bool]) -> None:
    """Refuse more than one of `options`, which say whether they were given."""
    given = [option for option, is_given in options.items() if is_given]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other", context)


def _read_document(file: Path) -> str:
    try:
        if file == Path("-"):
            data = sys.stdin.buffer.read(DOCUMENT_MAX + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(DOCUMENT_MAX + 1)
    except OSError as error:
        raise CkptmgrError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > DOCUMENT_MAX:
        raise InvalidDocument(f"{file} is larger than {DOCUMENT_MAX >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidDocument(f"{file} is not UTF-8 text (byte {error.start})") from error


COMMANDS = (create, list_, show, current, parent, delete, redefine, adopt)
