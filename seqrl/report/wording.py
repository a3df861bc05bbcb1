"""How numbers and durations are written for people."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Short and without an exponent where that stays readable: 0.53, 0.0013, 23.4, 1,024, 3.1e-06."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0 or 0.1 <= size < 10:
        return f"{value:.2f}"
    if size < 0.1:
        return f"{value:.1e}" if size < 1e-4 else f"{value:.{1 - math.floor(math.log10(size))}f}"
    return f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`0.82 s`, `42 s`, `2m31s`, `1h05m`, `3d04h`."""
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"
