"""Printing certified numbers: lower bounds are rounded down, upper bounds up, and what was asked for is not rounded.

A radius, a certified cosine or the lower end of an interval is printed by `format_down`; an error probability or any
other "at most" by `format_up`; a radius, threshold or noise level that a user stated by `format_exact`.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def floor_to(value: float, digits: int = 3) -> float:
    """Return the largest multiple of `10**-digits` that is not above `value`, exact in decimal.

    Example:
        >>> floor_to(0.2999), floor_to(-0.0001), floor_to(0.29)
        (0.299, -0.001, 0.29)
    """
    return float(_floored(value, digits))


def format_down(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` decimals, rounded down, so that the printed claim is implied by the computed one.

    Example:
        >>> format_down(0.9999), format_down(0.5), format_down(float("nan"))
        ('0.999', '0.500', 'nan')
    """
    return f"{_floored(value, digits):.{digits}f}" if value == value else "nan"


def format_up(value: float, significant: int = 3) -> str:
    """Return `value` with at most so many significant digits, rounded up: an upper limit that is printed still holds.

    Example:
        >>> format_up(0.0200001), format_up(0.001), format_up(12.0), format_up(1234.5), format_up(0.0)
        ('0.0201', '0.001', '12', '1240', '0')
    """
    number = Decimal(repr(float(value)))
    if not number.is_finite() or not number:
        return f"{value:g}"
    step = Decimal(1).scaleb(number.adjusted() - significant + 1)
    return _short((number / step).to_integral_value(rounding=ROUND_CEILING) * step)


def format_exact(value: float) -> str:
    """Return the shortest decimal that reads back as `value`: what was asked for is shown as it was asked.

    Example:
        >>> format_exact(0.1234567), format_exact(0.25), format_exact(2.0), format_exact(1e-07)
        ('0.1234567', '0.25', '2', '1e-07')
    """
    text = repr(float(value))
    return text.removesuffix(".0")


def _short(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _floored(value: float, digits: int) -> Decimal:
    # The shortest decimal that reads back as this float; what is printed reads back as a float that is not above it.
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR)
