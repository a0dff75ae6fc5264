"""Which points stay, by their times: pure.

Each rule goes over the points of one domain from the newest to the oldest and keeps the newest one
of every period in which there is one, until it has as many as it was asked for; `last` has each
point as a period of its own.  What any rule keeps stays, and so does the newest point, on which the
domain's next increment is to stand.  Periods are those of local time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime

from ..errors import InvalidRequest

NEWEST = "newest"
"""Why the newest point stays, whatever the rules are."""


@dataclass(frozen=True)
class Retention:
    """How many points stay of each kind of period; None: the rule is not used.

    Raises InvalidRequest where no rule is used, and for a number below one.
    """

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    def __post_init__(self) -> None:
        rules = self.rules()
        if not rules:
            raise InvalidRequest(
                "nothing says which restore points are to stay",
                hint="give at least one of --keep-last, --keep-hourly, --keep-daily, "
                "--keep-weekly, --keep-monthly, --keep-yearly",
            )
        for rule, count in rules.items():
            if type(count) is not int or count < 1:
                raise InvalidRequest(f"{rule} keeps one point or more, not {count!r}")

    def rules(self) -> dict[str, int]:
        """The rules that are used, and how many points each keeps."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {rule: count for rule, count in values.items() if count is not None}


def local(seconds: int) -> datetime:
    """The local time at `seconds` since the epoch."""
    return datetime.fromtimestamp(seconds).astimezone()


def period(rule: str, time: datetime) -> object:
    """What two times have in common that are in one period of `rule`."""
    match rule:
        case "hourly":
            # An hour that comes twice, when the clocks go back, is two.
            return time.date(), time.hour, time.utcoffset()
        case "daily":
            return time.date()
        case "weekly":
            return time.isocalendar()[:2]
        case "monthly":
            return time.year, time.month
        case "yearly":
            return time.year
    raise ValueError(f"there is no rule {rule}")


def kept(
    points: Sequence[tuple[str, int]],
    retention: Retention,
    clock: Callable[[int], datetime] = local,
) -> dict[str, tuple[str, ...]]:
    """The points that stay, and the rules that keep each.

    points -- of one domain: name and time of creation in seconds, the oldest first
    """
    reasons: dict[str, list[str]] = {}
    newest_first = list(reversed(points))
    for name, _ in newest_first[:1]:
        reasons[name] = [NEWEST]
    for rule, count in retention.rules().items():
        seen: set[object] = set()
        for name, created in newest_first:
            if len(seen) == count:
                break
            which = name if rule == "last" else period(rule, clock(created))
            if which not in seen:
                seen.add(which)
                reasons.setdefault(name, []).append(rule)
    return {name: tuple(reasons[name]) for name, _ in points if name in reasons}
