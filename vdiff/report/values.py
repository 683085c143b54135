"""Numbers as people read them: digits that the standard error supports, durations in their usual units."""

import math
from numbers import Integral
from typing import SupportsFloat

Value = str | SupportsFloat | None


def format_value(value: Value, std_error: SupportsFloat | None = None) -> str:
    """Write a number for people: two digits of its standard error, or else four digits of its own.

    Returns:
        E.g. "−86.421 ± 0.013", "12,345", "1.234"; a text as it is, "–" for None.
    """
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, Integral) and std_error is None:
        return _minus(f"{value:,}")
    value, error = float(value), 0.0 if std_error is None else float(std_error)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else _minus(f"{value}".replace("inf", "∞"))
    if math.isfinite(error) and error > 0:
        decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
        return _minus(f"{value:,.{decimals}f} ± {error:,.{decimals}f}")
    size = math.floor(math.log10(abs(value))) if value else 0
    return _minus(f"{value:,.{min(3, max(0, 3 - size))}f}" if -3 < size < 9 else f"{value:.3g}")


def format_milliseconds(seconds: float | None) -> str:
    """Write a short time in milliseconds, to two digits, e.g. "0.017 ms", "56 ms"; "–" for None."""
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"


def format_seconds(seconds: float) -> str:
    """Write a duration for people, e.g. "0.8 s", "42 s", "12 min 3 s", "1 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
