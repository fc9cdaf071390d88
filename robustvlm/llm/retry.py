"""How long to wait before asking again."""

from __future__ import annotations

import datetime
import email.utils
from collections.abc import Mapping

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
"""Status codes that may be gone at the next attempt."""


def pause(attempt: int, jitter: float, asked: float | None = None) -> float:
    """Return the seconds to wait after failure number `attempt` (from 0): exponential, with jitter, as asked at least.

    Args:
        jitter: uniform on [0, 1): spreads clients that failed together.
        asked: what the server's Retry-After says, if anything.

    Example:
        >>> pause(0, 0.0), pause(3, 0.5), pause(0, 0.0, asked=7.0)
        (0.25, 3.0, 7.0)
    """
    backoff = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * (0.5 + 0.5 * jitter)
    return max(backoff, asked or 0.0)


def retry_after(headers: Mapping[str, str], now: datetime.datetime | None = None) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, 10.2.3) asks for, a number or a date; None without one.

    Example:
        >>> retry_after({"retry-after": "2.5"}), retry_after({"retry-after": "soon"})
        (2.5, None)
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (when - (now or datetime.datetime.now(datetime.timezone.utc))).total_seconds())
