"""Numbers and times for people; JSON has bytes and RFC 3339."""

from __future__ import annotations

from datetime import datetime

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(count: int) -> str:
    """`count` bytes in binary units: ``0 B``, ``64 KiB``, ``1.5 MiB``.

    One decimal, which is only missing where there is nothing behind it: ``64 KiB`` is exact,
    ``64.0 KiB`` is rounded.
    """
    power = 0
    while power < len(_UNITS) - 1 and count >= 1024 ** (power + 1):
        power += 1
    whole, rest = divmod(count, 1024**power)
    if not rest:
        return f"{whole} {_UNITS[power]}"
    tenths = (count * 20 // 1024**power + 1) // 2  # rounded half up, without floats
    if tenths >= 10240 and power < len(_UNITS) - 1:
        tenths, power = 10, power + 1
    return f"{tenths // 10}.{tenths % 10} {_UNITS[power]}"


def percent(part: int, whole: int) -> str:
    """`part` of `whole`: ``0%`` and ``100%`` mean exactly that, nothing rounds to them."""
    if part <= 0 or whole <= 0:
        return "0%"
    if part >= whole:
        return "100%"
    hundredths = (part * 20000 // whole + 1) // 2
    if hundredths == 0:
        return "<0.01%"
    if hundredths == 10000:
        return ">99.99%"
    return f"{hundredths // 100}.{hundredths % 100:02}%"


def local_time(seconds: int) -> str:
    """Seconds since the epoch in local time with its offset, ``2026-11-22 10:30:00 +0100``."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (OverflowError, ValueError, OSError):
        return f"@{seconds}"  # a document may name a year that no calendar has
