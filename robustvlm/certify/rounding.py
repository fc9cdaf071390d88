"""Printing certified numbers: radii and cosines are rounded down, never up."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal


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


def _floored(value: float, digits: int) -> Decimal:
    # The shortest decimal that reads back as this float; what is printed reads back as a float that is not above it.
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR)
