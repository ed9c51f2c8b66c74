"""Numbers and names as people read them: signs, intervals, powers of ten, the parametrizations' short names."""

from __future__ import annotations

import math

__all__ = [
    "across",
    "interval",
    "label",
    "long_label",
    "counted",
    "number",
    "octaves",
    "ordered",
    "percent",
    "plain",
    "power_of_ten",
    "power_of_two",
    "regret",
    "signed",
]

SHORT = {"mup": "µP", "sp": "SP", "ntk": "NTK", "completep": "CompleteP", "umup": "u-µP"}
LONG = {"mup": "maximal update parametrization", "sp": "standard parametrization"}
POWERS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


def label(parametrization: str) -> str:
    """Return the name papers use for a parametrization ("mup" → "µP")."""
    return SHORT.get(parametrization, parametrization)


def long_label(parametrization: str) -> str:
    """Return the short name with its long one behind, where there is one."""
    return f"{label(parametrization)}, {LONG[parametrization]}" if parametrization in LONG else label(parametrization)


def ordered(parametrizations: list[str]) -> list[str]:
    """Return the names once each, the standard parametrization first: what is fixed stands right of what was wrong."""
    return sorted(dict.fromkeys(parametrizations), key=lambda name: name != "sp")


def signed(value: float, digits: int = 2) -> str:
    """Return "+0.50" or "−0.50", with a true minus; rounding to zero gives "0.00" without a sign."""
    text = f"{value:+.{digits}f}".replace("-", "−").replace("inf", "∞")
    return text[1:] if math.isfinite(value) and not float(text[1:]) else text


def interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """Return "+0.50 [+0.41, +0.60]", or the value alone when no interval is known; "–" for no value."""
    if not math.isfinite(value):
        return "–"
    if math.isnan(low) or math.isnan(high):
        return signed(value, digits)
    return f"{signed(value, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Return a fraction and its interval in percent."""
    text = interval(100 * value, 100 * low, 100 * high, 1)
    return text if text == "–" else text + "\u00a0%"


def regret(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Return a difference of losses with its interval, in the loss's own unit; infinite where the run diverged."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "diverged"
    return number(value) + ("" if math.isnan(low) or math.isnan(high) else f" [{number(low)}, {number(high)}]")


def octaves(value: float, low: float, high: float) -> str:
    """Return a drift with its interval and unit."""
    return interval(value, low, high) + ("" if not math.isfinite(value) else "\u00a0octaves")


def number(value: object) -> str:
    """Return a count or a float in few digits; large and small ones as 3.1 × 10¹⁵; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}\u00a0×\u00a0{power_of_ten(int(exponent))}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def counted(count: int, what: str) -> str:
    """Return "1 trial" or "3 trials"."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def power_of_ten(exponent: int) -> str:
    """Return "10¹⁵"."""
    return f"10{str(exponent).translate(POWERS)}"


def power_of_two(exponent: float) -> str:
    """Return "2⁻⁷" or "2⁻⁶·⁹⁷"; "–" for no value."""
    return f"2{f'{round(exponent, 2):g}'.translate(POWERS)}" if math.isfinite(exponent) else "–"


def across(widths: list[int]) -> str:
    """Return "width 64 → 1024"."""
    return f"width {min(widths)} → {max(widths)}"


def plain(name: str, longest: int = 30) -> str:
    """Return a user's name so that any font draws it: unknown letters as escapes, the middle of a long one cut out."""
    text = "".join(c if c.isprintable() else " " for c in name).encode("latin-1", "backslashreplace").decode("latin-1")
    head = longest * 2 // 5
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"
