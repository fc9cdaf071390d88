"""What tests of detect runs share: attacks for them, an interruption, and what lasts of a summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from robustvlm.commands.detect.summary import DetectSummary
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer

CLASSES = ("cat", "dog", "fox")
DetectRun = Callable[..., Run]

ATTACK: dict[str, Any] = {
    "scores": "energy,mahalanobis",
    "under_attack": True,
    "attack_scores": "energy,mahalanobis",
    "attack": "pgd:steps=5,apgd-ce:steps=5",
    "eps": "8/255",
    "attack_limit": 6,
    "lanes": 8,
}


class Interrupt(Observer):
    """Presses Ctrl-C after so many images."""

    def __init__(self, images: int) -> None:
        self.left = images

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def lasting(summary: DetectSummary) -> str:
    """A summary without what a clock decides, and without the last digits, which batch sizes decide."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            clock = ("seconds", "encode_ms", "microseconds")
            return {key: kept(part) for key, part in value.items() if key not in clock}
        if isinstance(value, list):
            return [kept(part) for part in value]
        return round(value, 3) if isinstance(value, float) else value

    return json.dumps(kept(summary.model_dump(mode="json")), indent=1)
