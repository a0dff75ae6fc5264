"""A tree of names, from what each is recorded to come after.

What is recorded may be damaged in part: a name that is not there, names in a circle.  Those are
roots, and every walk ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Tree:
    """Names and their relations; made by `tree`.

    parents -- the parent of each, None for a root
    children -- the children of each in their order; of None, the roots
    """

    parents: Mapping[str, str | None]
    children: Mapping[str | None, tuple[str, ...]]

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The parent of `name`, its parent, and so on up to a root."""
        found = []
        above = self.parents[name]
        while above is not None:
            found.append(above)
            above = self.parents[above]
        return tuple(found)

    def descendants(self, name: str | None) -> tuple[str, ...]:
        """All below `name`, or all there are: depth first, parents before children."""
        found: list[str] = []
        waiting = list(reversed(self.children[name]))
        while waiting:  # without recursion, lines can be long
            below = waiting.pop()
            found.append(below)
            waiting.extend(reversed(self.children[below]))
        return tuple(found)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All of them depth first, parents before children."""
        return self.descendants(None)

    def times(self, created: Callable[[str], int]) -> dict[str, int]:
        """When each was made, the oldest first.

        None is older than its parent, though its time may be: the host's clock may have been put
        back between the two.  Between branches there is nothing but the times to go by: what is
        made on another branch after that is older than the branch that was left, until the clock
        has passed the times of that.

        created -- when, in seconds, as recorded
        """
        found: dict[str, int] = {}
        for name in self.order:
            above = self.parents[name]
            found[name] = max(created(name), created(name) if above is None else found[above])
        # They are in the order of the tree, which sorting leaves to those of one time.
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def leaves(self) -> tuple[str, ...]:
        """Those without children, in that order."""
        return tuple(name for name in self.order if not self.children[name])


def tree(recorded: Mapping[str, str | None], created: Callable[[str], int]) -> Tree:
    """The tree of all names in `recorded`.

    recorded -- what each comes after, whether that is there or not
    created -- when, in seconds: the order of siblings, and then that of their names
    """
    there = {name: above if above in recorded else None for name, above in recorded.items()}
    circular = _circular(there)
    parents = {name: None if name in circular else above for name, above in there.items()}
    children: dict[str | None, list[str]] = {None: [], **{name: [] for name in recorded}}
    for name in sorted(recorded, key=lambda name: (created(name), name)):
        children[parents[name]].append(name)
    return Tree(parents, {name: tuple(below) for name, below in children.items()})


def _circular(recorded: Mapping[str, str | None]) -> set[str]:
    """The names that are their own ancestors."""
    found: set[str] = set()
    done: set[str] = set()
    for name in recorded:
        line: dict[str, None] = {}
        above: str | None = name
        while above is not None and above not in done and above not in line:
            line[above] = None
            above = recorded[above]
        if above in line:
            walked = list(line)
            found.update(walked[walked.index(above) :])
        done.update(line)
    return found
