"""What an immunised model does, in plain words: terminal and report say the same things with these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustvlm.report.wording import interval, percent, plain
from robustvlm.stats import Rate

Record = Mapping[str, Any]


def verdict(record: Record) -> str:
    """Say which share of unknown images the model rejects, and of known ones, at the thresholds it is deployed with."""
    measures = record["measures"]
    if not measures:
        return "Made from texts alone: how many images of either kind it rejects has not been measured."
    unknown = [f"{_rate(rejected_of(found))} of {plain(spec, 60)}" for spec, found in measures["unknown"].items()]
    if unknown:
        first = f"Of unknown images the model rejects, at its own thresholds, {'; '.join(unknown)}."
    else:
        first = "How many unknown images the model rejects has not been measured: pass --ood DATA."
    return (
        f"{first} Of the known ones it wrongly refuses {_rate(Rate(**measures['rejected']))}: held-out images, which "
        "set the thresholds too, so expect more elsewhere."
    )


def tone(record: Record) -> str:
    """Return the colour class of the verdict: "held" (green), "" (red) or "neutral".

    Red: less than half of the unknown images of some set are rejected. Green: at least nine tenths of every set are, by
    the lower end of the interval, and no more than a tenth of the known ones refused. Without unknown images neither.
    """
    measures = record["measures"]
    if not measures or not measures["unknown"]:
        return "neutral"
    rates = [rejected_of(found) for found in measures["unknown"].values()]
    if any(rate.value is None or rate.value < 0.5 for rate in rates):
        return ""
    refused = Rate(**measures["rejected"])
    oracle = any(note.startswith("Oracle") for note in record["notes"])
    good = all(rate.low >= 0.9 for rate in rates) and refused.value is not None and refused.value <= 0.1
    return "held" if good and not oracle else "neutral"


def rejected_of(found: Mapping[str, Any]) -> Rate:
    """Return the share of unknown images rejected, of a record that may be of the time when the accepted were kept."""
    if "rejected" in found:
        return Rate(**found["rejected"])
    accepted = Rate(**found["accepted"])
    share = None if accepted.value is None else 1 - accepted.value
    return Rate(
        successes=accepted.total - accepted.successes,
        total=accepted.total,
        value=share,
        low=1 - accepted.high,
        high=1 - accepted.low,
    )


def _rate(found: Rate) -> str:
    if found.value is None:
        return "none"
    return f"{percent(found.value)} ({interval(found)})"
