"""What a language model's answers cost: requests, tokens and, where prices are given, money."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from robustvlm.errors import UserError


@dataclass(frozen=True)
class Prices:
    """Price of a million tokens read and of a million tokens written, in any currency.

    Raises:
        UserError: a negative price.

    Example:
        >>> Prices.parse("0.15,0.60")
        Prices(read=0.15, written=0.6)
    """

    read: float
    written: float

    def __post_init__(self) -> None:
        if not (0 <= self.read < math.inf and 0 <= self.written < math.inf):
            raise UserError(f"prices must be numbers of at least 0, got {self.read:g} and {self.written:g}")

    @classmethod
    def parse(cls, text: str) -> Prices:
        """Read `IN,OUT`."""
        try:
            read, written = (float(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"prices are written IN,OUT per million tokens, as 0.15,0.60; got '{text}'") from None
        return cls(read, written)


@dataclass(frozen=True)
class Usage:
    """Counts over any number of questions; `uncounted` requests are those whose reply told no tokens.

    Example:
        >>> usage = Usage(requests=2, cached=3, tokens_read=1000, tokens_written=500)
        >>> print(usage.describe(Prices(1.0, 2.0)))
        2 requests, 3 answers from the cache, 1,000 tokens read, 500 written, cost 0.0020
    """

    requests: int = 0
    cached: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    uncounted: int = 0

    def with_reply(self, reply: Any) -> Usage:
        """Return the counts with one more reply, a parsed chat completion or None where there was none."""
        told = reply.get("usage") if isinstance(reply, dict) else None
        read, written = (_count(told, name) for name in ("prompt_tokens", "completion_tokens"))
        if read is None or written is None:
            return replace(self, requests=self.requests + 1, uncounted=self.uncounted + (reply is not None))
        return replace(
            self,
            requests=self.requests + 1,
            tokens_read=self.tokens_read + read,
            tokens_written=self.tokens_written + written,
        )

    def with_cached(self) -> Usage:
        """Return the counts with one more answer that needed no request."""
        return replace(self, cached=self.cached + 1)

    def cost(self, prices: Prices) -> float:
        """Return what the tokens cost; requests that told no tokens are not in it."""
        return (self.tokens_read * prices.read + self.tokens_written * prices.written) / 1e6

    def describe(self, prices: Prices | None = None) -> str:
        """Return one line for the user."""
        words = [f"{self.requests:,} requests", f"{self.cached:,} answers from the cache"]
        words += [f"{self.tokens_read:,} tokens read", f"{self.tokens_written:,} written"]
        if prices is not None:
            words.append(f"cost {self.cost(prices):.4f}")
        if self.uncounted:
            words.append(f"{self.uncounted:,} replies told no tokens")
        return ", ".join(words)


def _count(told: Any, name: str) -> int | None:
    value = told.get(name) if isinstance(told, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
