from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from ckptmgr.errors import OperationFailed, Unsupported
from ckptmgr.plan import libvirt as planner
from ckptmgr.plan.request import (
    CreateDisk,
    CreateRequest,
    DeleteDisk,
    DeleteRequest,
    ReadDisk,
    ReadRequest,
    UndoRequest,
)
from ckptmgr.plan.steps import (
    BackupBegin,
    BackupEnd,
    CheckpointCreate,
    CheckpointDelete,
    CheckpointPurge,
    CheckpointRedefine,
    Export,
    Quiesced,
    ReadMaps,
    Server,
    TcpServer,
)
from ckptmgr.xml import parse
from tests.plan_examples import bitmap, disk, layer

SCHEMA = Path("/usr/share/libvirt/schemas/domainbackup.rng")
SOCKET = "/run/x.sock"
FAR = TcpServer("192.0.2.7", 10809)
DOCUMENT = "<domaincheckpoint><name>c2</name></domaincheckpoint>"
REDEFINITION = """
<domaincheckpoint>
  <name>c2</name>
  <creationTime>1</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='c2'/>
    <disk name='vdb' checkpoint='bitmap' bitmap='c2' size='65536'/>
    <disk name='vdc' checkpoint='no'/>
  </disks>
</domaincheckpoint>"""


def tracked(target: str, since: str | None = None, scratch: str | None = None) -> CreateDisk:
    return CreateDisk(
        target, since=since, since_granularity=65536, scratch=scratch or f"/run/x-{target}.scratch"
    )


def request(*disks: CreateDisk, socket: Server | None = SOCKET, quiesce: float | None = None):
    return CreateRequest("c2", DOCUMENT, REDEFINITION, disks, socket, quiesce=quiesce)


def backup_of(plan) -> etree._Element:
    begin = next(step for step in plan.steps if isinstance(step, BackupBegin))
    return parse(begin.backup)


def test_a_first_checkpoint_is_one_plain_call():
    plan = planner.create(request(tracked("vda"), tracked("vdb")))
    assert plan.steps == (CheckpointCreate(DOCUMENT),)


def test_an_interval_is_frozen_at_the_instant_that_makes_the_checkpoint():
    plan = planner.create(request(tracked("vda", "c1")))
    begin, read, end = plan.steps
    assert isinstance(begin, BackupBegin)
    assert begin.checkpoint == DOCUMENT
    assert read == ReadMaps(SOCKET, (Export("vda", "vda", "backup-vda", 65536),))
    assert end == BackupEnd(SOCKET)


def test_a_disk_without_an_interval_takes_no_part_in_the_backup_job():
    plan = planner.create(request(tracked("vda"), tracked("vdb", "c1")))
    assert backup_of(plan).xpath("disks/disk/@name") == ["vdb"]


def test_disks_may_end_intervals_that_began_at_different_checkpoints():
    plan = planner.create(request(tracked("vda", "c1"), tracked("vdb", "c0")))
    assert backup_of(plan).xpath("disks/disk/@incremental") == ["c1", "c0"]


@pytest.mark.skipif(not SCHEMA.exists(), reason="libvirt's schemas are not installed")
def test_the_backup_document_validates_against_libvirts_schema():
    plan = planner.create(request(tracked("vda", "c1"), tracked("sdb", "c0")))
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    document = backup_of(plan)
    assert schema.validate(document), schema.error_log


@pytest.mark.parametrize("name", ["a b", "it's", 'say "hi"', "a<b>&c", "žluťoučký", "a,b:c"])
def test_any_path_survives_in_the_backup_document(name):
    socket, scratch = f"/run/{name}/s", f"/run/{name}/scratch"
    document = backup_of(planner.create(request(tracked("vda", "c1", scratch), socket=socket)))
    assert document.find("server").get("socket") == socket
    assert document.find("disks/disk/scratch").get("file") == scratch


def test_a_socket_path_that_no_unix_socket_can_have_is_refused():
    longest = "/" + "é" * 53
    assert len(longest.encode()) == 107
    planner.create(request(tracked("vda", "c1"), socket=longest))
    with pytest.raises(Unsupported, match="108 bytes"):
        planner.create(request(tracked("vda", "c1"), socket=longest + "x"))


def test_a_plain_create_needs_no_socket():
    planner.create(request(tracked("vda"), socket=None))
    with pytest.raises(Unsupported):
        planner.create(request(tracked("vda", "c1"), socket=None))


def test_libvirt_is_never_left_to_choose_where_scratch_files_go():
    with pytest.raises(OperationFailed, match="vda"):
        planner.create(request(CreateDisk("vda", since="c1")))


def test_the_guest_is_frozen_only_while_the_checkpoint_is_made():
    plan = planner.create(request(tracked("vda", "c1"), quiesce=5.0))
    frozen = [step for step in plan.steps if isinstance(step, Quiesced)]
    assert [type(step.step) for step in frozen] == [BackupBegin]
    assert frozen[0].timeout == 5.0


def test_undo_ends_the_job_before_it_removes_the_checkpoint():
    plan = planner.create(request(tracked("vda", "c1")))
    assert plan.undo == (BackupEnd(SOCKET), CheckpointPurge("c2", REDEFINITION))


def test_undo_at_a_later_time_is_the_same():
    plan = planner.create(request(tracked("vda", "c1")))
    assert planner.undo_create(UndoRequest("c2", REDEFINITION, socket=SOCKET)) == plan.undo


def test_release_touches_no_checkpoint():
    plan = planner.create(request(tracked("vda", "c1")))
    assert plan.release == (BackupEnd(SOCKET),)


def delete_request(*disks: DeleteDisk, known: bool = True, redefinition: str | None = REDEFINITION):
    return DeleteRequest("c2", disks, known, redefinition)


def test_delete_without_a_look_at_the_bitmaps_is_one_plain_call():
    plan = planner.delete(delete_request(DeleteDisk("vda"), DeleteDisk("vdb")))
    assert plan.steps == (CheckpointDelete("c2"),)


def test_delete_after_a_lost_bitmap_shows_libvirt_the_other_disks_alone():
    plan = planner.delete(delete_request(DeleteDisk("vda", missing=True), DeleteDisk("vdb")))
    redefine, delete = plan.steps
    assert isinstance(redefine, CheckpointRedefine)
    assert planner.tracked_disks(redefine.document) == ("vdb",)
    assert delete == CheckpointDelete("c2")
    assert "vda" in plan.notes[0]


def test_observed_layers_tell_which_bitmaps_are_lost():
    held = disk("vda", layer(1), layer(2, bitmap("c2")))
    lost = disk("vdb", layer(3, bitmap("c1")))
    plan = planner.delete(delete_request(DeleteDisk("vda", held), DeleteDisk("vdb", lost)))
    redefine = plan.steps[0]
    assert isinstance(redefine, CheckpointRedefine)
    assert planner.tracked_disks(redefine.document) == ("vda",)


def test_delete_of_a_checkpoint_without_any_bitmap_removes_its_metadata():
    plan = planner.delete(delete_request(DeleteDisk("vda", missing=True)))
    assert plan.steps == (CheckpointDelete("c2", metadata_only=True, missing_ok=True),)


def test_delete_of_a_checkpoint_that_libvirt_lost_shows_it_first():
    plan = planner.delete(delete_request(DeleteDisk("vda"), DeleteDisk("vdb"), known=False))
    assert [type(step) for step in plan.steps] == [CheckpointRedefine, CheckpointDelete]


def test_delete_of_a_checkpoint_that_nobody_has_does_nothing():
    assert planner.delete(delete_request(DeleteDisk("vda", missing=True), known=False)).steps == ()


def test_delete_that_needs_a_document_and_has_none_is_an_error():
    with pytest.raises(OperationFailed, match="c2"):
        planner.delete(delete_request(DeleteDisk("vda"), known=False, redefinition=None))


def test_metadata_alone_is_deleted_where_that_was_asked():
    asked = DeleteRequest("c2", (DeleteDisk("vda"),), True, REDEFINITION, metadata_only=True)
    assert planner.delete(asked).steps == (
        CheckpointDelete("c2", metadata_only=True, missing_ok=True),
    )


def test_a_disk_taken_out_of_a_document_leaves_nothing_of_its_bitmap():
    shown = parse(planner.with_disks(REDEFINITION, ["vda"]))
    assert [dict(element.attrib) for element in shown.iterfind("disks/disk")] == [
        {"name": "vda", "checkpoint": "bitmap", "bitmap": "c2"},
        {"name": "vdb", "checkpoint": "no"},
        {"name": "vdc", "checkpoint": "no"},
    ]


def test_reading_makes_no_checkpoint_and_ends_its_job():
    plan = planner.read(
        ReadRequest((ReadDisk("vda", "c1", 4096, scratch="/run/x-vda.scratch"),), SOCKET)
    )
    begin, read, end = plan.steps
    assert isinstance(begin, BackupBegin)
    assert begin.checkpoint is None
    assert read == ReadMaps(SOCKET, (Export("vda", "vda", "backup-vda", 4096),))
    assert plan.undo == (end,) == (BackupEnd(SOCKET),)


# --- over the network ----------------------------------------------------------------------------


@pytest.mark.skipif(not SCHEMA.exists(), reason="libvirt's schemas are not installed")
@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "hv1.example"])
def test_a_backup_document_for_the_network_validates_against_libvirts_schema(host):
    plan = planner.create(request(tracked("vda", "c1"), socket=TcpServer(host, 10809)))
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    assert schema.validate(backup_of(plan)), schema.error_log


@pytest.mark.parametrize(("tls", "word"), [(True, "yes"), (False, "no")])
def test_libvirt_is_told_where_to_listen_and_whether_with_tls(tls, word):
    plan = planner.create(request(tracked("vda", "c1"), socket=TcpServer("h", 7, tls)))
    server = backup_of(plan).find("server")
    assert dict(server.attrib) == {"transport": "tcp", "tls": word, "name": "h", "port": "7"}


def test_what_is_read_over_the_network_says_that_it_is_ours():
    plan = planner.create(request(tracked("vda", "c1"), socket=FAR))
    _, read, end = plan.steps
    assert read == ReadMaps(FAR, (Export("vda", "ckptmgr-vda", "backup-vda", 65536),))
    assert end == BackupEnd(FAR)
    assert backup_of(plan).xpath("disks/disk/@exportname") == ["ckptmgr-vda"]
    assert "nbds://192.0.2.7:10809" in str(read)


@pytest.mark.parametrize("server", [SOCKET, FAR])
def test_a_job_of_ours_is_known_again(server):
    plan = planner.create(request(tracked("vda", "c1"), tracked("vdb", "c1"), socket=server))
    assert planner.serves(plan.steps[0].backup, server)


@pytest.mark.parametrize(
    "job",
    [
        "<domainbackup mode='push'><disks/></domainbackup>",
        "<domainbackup><server transport='unix' socket='/run/y.sock'/><disks/></domainbackup>",
        "<domainbackup><server transport='tcp' name='192.0.2.7' port='10809'/><disks>"
        "<disk name='vda' backup='yes' exportname='vda'/></disks></domainbackup>",
        "<domainbackup><server transport='tcp' name='192.0.2.7' port='1'/><disks>"
        "<disk name='vda' backup='yes' exportname='ckptmgr-vda'/></disks></domainbackup>",
    ],
)
def test_a_job_of_somebody_elses_is_not_taken_for_ours(job):
    assert not planner.serves(job, SOCKET)
    assert not planner.serves(job, FAR)
