"""Whatever is observed can be examined, and its cures lead to where nothing is left to cure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.checkpoint import Interval, State, shown_disks
from ckptmgr.consistency import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Forget,
    GoBack,
    Known,
    MarkArchived,
    MarkBroken,
    MarkUnknown,
    Observation,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
    examine,
)
from ckptmgr.domain.disk import Bitmap, Disk, DiskLayers, Layer
from ckptmgr.domain.marker import Marker
from ckptmgr.history import History
from ckptmgr.plan.libvirt import DISCARD
from ckptmgr.store import DomainRecord, Intent

from .mismatches import CASES
from .observations import SIZE, damage, disk, image, projected, recorded_as, without
from .strategies import DISKS, Model, models


@given(models(unknown=True))
def test_a_history_that_is_everywhere_as_recorded_gives_no_findings(model: Model) -> None:
    history = model.history
    for name in list(history.checkpoints):
        for recorded in history.get(name).disks:
            changes = {"size": SIZE, "source": image(recorded.name)}
            history = recorded_as(history, name, recorded.name, **changes)
    assert examine(projected(history)) == ()


names = st.sampled_from([f"c{number}" for number in range(6)] + ["x", "ckptmgr-vda", DISCARD])
found_bitmaps = st.builds(
    Bitmap,
    name=names,
    granularity=st.just(65536),
    recording=st.booleans(),
    persistent=st.booleans(),
    inconsistent=st.booleans(),
    busy=st.booleans(),
)
found_layers = st.builds(
    Layer,
    image=st.sampled_from(["/a", "/b", "/img/vda.qcow2"]),
    node=st.none() | st.sampled_from(["n1", "n2"]),
    size=st.none() | st.sampled_from([SIZE, 2 * SIZE]),
    bitmaps=st.lists(found_bitmaps, max_size=3, unique_by=lambda each: each.name).map(tuple),
)
targets = st.sampled_from([*DISKS, "vdc"])
states = st.sampled_from([State.ARCHIVED, State.BROKEN, State.FROZEN])


def _layers_of(found: Mapping[str, list[Layer]]) -> dict[str, DiskLayers]:
    return {target: DiskLayers(target, tuple(layers)) for target, layers in found.items()}


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Any history, and anything else beside it."""
    history = draw(models(max_size=6, unknown=True)).history
    for name in list(history.checkpoints):
        for recorded in history.get(name).disks:
            if recorded.bitmap is not None:
                state = draw(st.just(recorded.state) | states)
                size = draw(st.none() | st.sampled_from([SIZE, 2 * SIZE]))
                changes = {"state": state, "size": size, "source": draw(st.none() | st.just("/a"))}
                history = recorded_as(history, name, recorded.name, **changes)
    for name in draw(st.lists(names, max_size=2)):
        left = {each: point for each, point in history.checkpoints.items() if each != name}
        history = History(left, history.current if history.current in left else None)
    disks = tuple(
        disk(target, *images, size=size) if images else Disk(target, "virtio", size=size)
        for target, images, size in draw(
            st.lists(
                st.tuples(
                    targets,
                    st.lists(st.sampled_from(["/a", "/b"]), max_size=2),
                    st.sampled_from([SIZE, 2 * SIZE]),
                ),
                unique_by=lambda each: each[0],
                max_size=3,
            )
        )
    )
    layers = st.dictionaries(targets, st.lists(found_layers, max_size=3), max_size=3)
    known = st.builds(
        Known,
        names,
        st.none() | names,
        st.frozensets(targets, max_size=2),
        st.none() | st.just("no"),
    )
    markers = st.none() | st.builds(Marker, st.none() | names, st.integers(0, 9))
    return Observation(
        domain=draw(st.sampled_from(["vm", "other"])),
        active=draw(st.booleans()),
        disks=disks,
        history=history,
        record=draw(
            st.builds(
                DomainRecord, st.sampled_from(["", "vm"]), st.none() | names, st.integers(0, 9)
            )
        ),
        damaged=tuple(
            damage(name)
            for name in draw(st.sets(st.sampled_from(["domain.json", "intent.json", "c1.xml"])))
        ),
        aside=draw(st.frozensets(names, max_size=2)),
        maps=draw(st.dictionaries(st.just("0" * 64), st.just("it is damaged"))),
        intent=draw(
            st.none()
            | st.builds(
                Intent,
                st.sampled_from(["create", "delete"]),
                st.lists(names, max_size=2).map(tuple),
                st.just("libvirt"),
            )
        ),
        layers=draw(st.none() | layers.map(_layers_of)),
        blind=draw(st.dictionaries(targets, st.just("no file"), max_size=1)),
        held=draw(st.dictionaries(targets, st.just("/a"), max_size=1)),
        sized=draw(st.dictionaries(names, st.frozensets(targets), max_size=3)),
        known=tuple(draw(st.lists(known, max_size=5, unique_by=lambda each: each.name))),
        told=draw(st.booleans()),
        marker=draw(markers),
        no_marker=draw(st.none() | st.just("no")),
        job=draw(st.booleans()),
        leftovers=draw(st.sampled_from([(), ("/x",)])),
    )


@settings(max_examples=150)
@given(observations())
def test_anything_can_be_examined(seen: Observation) -> None:
    found = examine(seen)
    for finding in found:
        json.dumps(finding.json())
        assert finding.message
        assert finding.cure
        assert finding.code in CASES
        if finding.harmless:
            assert finding.action is None
    # Nothing that is not recorded as ours is ever removed without being told to.
    for finding in found:
        if isinstance(finding.action, RemoveBitmap) and not finding.action.foreign:
            name = finding.action.bitmap
            ours = name in seen.history.checkpoints or name in seen.aside
            assert ours or name == f"ckptmgr-{finding.action.disk}"


def cured(seen: Observation, action: Action) -> Observation:
    """What would be observed after a cure: a model of what repair does."""
    history = seen.history

    def lose(seen: Observation, target: str, name: str) -> Observation:
        return without(seen, name, target) if target in (seen.layers or {}) else seen

    match action:
        case Settle():
            return replace(seen, intent=None)
        case EndJob():
            return replace(seen, job=False)
        case ClearWorkspace():
            return replace(seen, leftovers=())
        case SetAside():
            path = Path(action.path)
            left = tuple(each for each in seen.damaged if each.path != path)
            aside = {path.stem} if path.suffix == ".xml" else set()
            return replace(seen, damaged=left, aside=seen.aside | aside)
        case SetCurrent() | GoBack():
            generation = seen.record.generation + 1
            marker = None if action.checkpoint is None else Marker(action.checkpoint, generation)
            return replace(
                seen,
                history=replace(history, current=action.checkpoint),
                record=DomainRecord(seen.domain, action.checkpoint, generation),
                marker=marker,
                no_marker=None,
            )
        case MarkBroken():
            state = {"state": State.BROKEN, "reason": action.reason}
            history = recorded_as(history, action.checkpoint, action.disk, **state)
            seen = lose(replace(seen, history=history), action.disk, action.checkpoint)
            return _shown_again(seen, action.checkpoint)
        case MarkArchived():
            history = recorded_as(history, action.checkpoint, action.disk, state=State.ARCHIVED)
            seen = lose(replace(seen, history=history), action.disk, action.checkpoint)
            return _shown_again(seen, action.checkpoint)
        case MarkUnknown():
            recorded = history.get(action.checkpoint).disk(action.disk)
            assert recorded is not None
            assert recorded.interval is not None
            interval = Interval(recorded.interval.since, None, action.reason)
            history = recorded_as(history, action.checkpoint, action.disk, interval=interval)
            return replace(seen, history=history)
        case RemoveBitmap():
            return lose(seen, action.disk, action.bitmap)
        case Redefine():
            return _shown_again(seen, action.checkpoint)
        case Forget():
            return _forgotten(seen, action.checkpoint)
        case Adopt():
            taken = tuple(
                each.name
                for each in seen.known
                if each.name not in history.checkpoints and each.refused is None
            )
            for name in taken:
                seen = _forgotten(seen, name)  # or taken over: then it is not libvirt's alone
            return seen


def _forgotten(seen: Observation, name: str) -> Observation:
    """libvirt gives the children of what is deleted its parent."""
    above = next((each.parent for each in seen.known if each.name == name), None)
    known = (
        replace(each, parent=above) if each.parent == name else each
        for each in seen.known
        if each.name != name
    )
    return replace(seen, known=tuple(known))


def _shown_again(seen: Observation, name: str) -> Observation:
    if not seen.told:
        return seen
    shown = shown_disks(seen.history.get(name))
    if not shown:
        return _forgotten(seen, name)
    names = {each.name for each in seen.known}
    above = seen.history.parent(name)
    while above is not None and above not in names:
        above = seen.history.parent(above)
    others = tuple(each for each in seen.known if each.name != name)
    return replace(seen, known=(*others, Known(name, above, shown)))


@settings(max_examples=150)
@given(observations())
def test_the_cures_lead_to_where_nothing_is_left_to_cure(seen: Observation) -> None:
    """What remains needs a person, or is harmless; and there is no circle of cures."""
    for _ in range(60):
        wanted = [each for each in examine(seen) if each.curable(foreign=True)]
        if not wanted:
            break
        action = wanted[0].action
        assert action is not None
        seen = cured(seen, action)
    left = [finding for finding in examine(seen) if not finding.harmless]
    needs_a_person = {"unreadable-image", "image-in-use", "libvirt-only"}
    assert {finding.code for finding in left} <= needs_a_person
