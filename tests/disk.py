"""A disk that loses what was not made durable: records what the store does, and cuts the power.

The rules are those that POSIX leaves, not those of one file system: the content of a file is
certain after its fsync, names in a folder after the fsync of the folder; before that, any subset
of the changes of a folder may have reached the disk, and a file may hold nothing, half or all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.store import files

CALLS = (
    "_create",
    "_write",
    "_fsync",
    "_rename",
    "_unlink",
    "_mkdir",
    "_rmdir",
    "_fsync_folder",
)


@dataclass
class Recorder:
    """Records the system calls of ckptmgr.store.files, and can fail one of them.

    calls -- name and arguments of each, in order, and the marks between them
    before -- called with the number of each call before it is done
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    before: Callable[[int], None] = lambda number: None
    number: int = 0

    def mark(self, label: str) -> None:
        """Note that the store said that something is done."""
        self.calls.append(("mark", label))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of the system calls."""
        for name in CALLS:
            monkeypatch.setattr(files, name, self._wrapped(name, getattr(files, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            self.number += 1
            self.before(self.number)
            result = call(*arguments)
            if name in ("_write", "_fsync"):
                path = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                arguments = (path, *map(bytes, arguments[1:]))
            self.calls.append((name, *arguments))
            return result

        return recorded


@dataclass(frozen=True)
class Crash:
    """What may be on the disk after a power cut.

    files -- content by path, None for a folder
    done -- the marks passed before
    """

    files: tuple[tuple[Path, bytes | None], ...]
    done: tuple[str, ...]

    def restore(self, old: Path, new: Path) -> None:
        """Make the files, which were below `old`, below `new`."""
        for path, content in sorted(self.files):
            place = new / path.relative_to(old)
            if content is None:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                place.write_bytes(content)


def tree(folder: Path) -> dict[Path, bytes | None]:
    """What is in `folder`, which is taken as durable."""
    return {
        path: None if path.is_dir() else path.read_bytes()
        for path in (folder, *folder.rglob("*"))
        if path.exists()
    }


def power_cuts(start: dict[Path, bytes | None], calls: list[tuple[Any, ...]]) -> Iterator[Crash]:
    """Every state in which a power cut before, between or after `calls` may leave the disk."""
    seen: set[Crash] = set()
    for length in range(len(calls) + 1):
        for crash in _states(start, calls[:length]):
            if crash not in seen:
                seen.add(crash)
                yield crash


@dataclass
class _File:
    written: bytes = b""
    durable: bytes | None = None

    def contents(self) -> set[bytes]:
        if self.written == self.durable:
            return {self.written}
        return {b"", self.written[: len(self.written) // 2], self.written}


def _states(start: dict[Path, bytes | None], calls: list[tuple[Any, ...]]) -> Iterator[Crash]:
    names: dict[Path, _File | None] = {
        path: None if content is None else _File(content, content)
        for path, content in start.items()
    }
    now = dict(names)
    # Changes of names that are not durable, by folder: what goes and what comes.
    waiting: dict[Path, list[tuple[Path | None, Path | None, _File | None]]] = {}
    done = []
    for name, *arguments in calls:
        if name == "mark":
            done.append(arguments[0])
            continue
        path = arguments[0]
        if name == "_create":
            now[path] = _File()
            waiting.setdefault(path.parent, []).append((None, path, now[path]))
        elif name == "_mkdir":
            now[path] = None
            waiting.setdefault(path.parent, []).append((None, path, None))
        elif name == "_write":
            _file(now, path).written += arguments[1]
        elif name == "_fsync":
            _file(now, path).durable = _file(now, path).written
        elif name in ("_unlink", "_rmdir"):
            del now[path]
            waiting.setdefault(path.parent, []).append((path, None, None))
        elif name == "_rename":
            assert path.parent == arguments[1].parent
            assert arguments[1] not in waiting, "a folder is changed, then takes another's name"
            _apply(now, (path, arguments[1], now[path]))
            waiting.setdefault(path.parent, []).append((path, arguments[1], now[arguments[1]]))
        elif name == "_fsync_folder":
            for change in waiting.pop(path, ()):
                _apply(names, change)
    # Changes in a folder before those of its own name: they are recorded by the old one.
    inner = sorted(waiting, key=lambda folder: -len(folder.parts))
    chosen = product(*(_subsets(waiting[folder]) for folder in inner))
    for subset in chosen:
        left = dict(names)
        for changes in subset:
            for change in changes:
                _apply(left, change)
        there = [path for path in left if all(above in left for above in _above(path, start))]
        variants = [
            [(path, None)] if file is None else [(path, content) for content in file.contents()]
            for path in sorted(there)
            for file in [left[path]]
        ]
        for combination in product(*variants):
            yield Crash(tuple(combination), tuple(done))


def _above(path: Path, start: dict[Path, bytes | None]) -> list[Path]:
    """The folders below the one that was there at the start in which `path` lies."""
    top = min(start, key=lambda known: len(known.parts))
    return [above for above in path.parents if top in above.parents]


def _file(names: dict[Path, _File | None], path: Path) -> _File:
    found = names[path]
    assert found is not None
    return found


def _apply(
    names: dict[Path, _File | None], change: tuple[Path | None, Path | None, _File | None]
) -> None:
    gone, come, file = change
    if gone is not None and come is not None:  # a folder takes along what is in it
        for path in [path for path in names if gone in path.parents]:
            names[come / path.relative_to(gone)] = names.pop(path)
    if gone is not None:
        names.pop(gone, None)
    if come is not None:
        names[come] = file


def _subsets(changes: list[Any]) -> list[tuple[Any, ...]]:
    return [subset for size in range(len(changes) + 1) for subset in combinations(changes, size)]


def failing_at(number: int, error: int | type[BaseException]) -> Callable[[int], None]:
    """For `Recorder.before`: raises at one call, an OSError where `error` is an errno."""

    def before(call: int) -> None:
        if call == number:
            raise OSError(error, os.strerror(error)) if isinstance(error, int) else error()

    return before
