"""What a training run has to show: its history, and the facts that explain it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from robustvlm.core.reading import read_json
from robustvlm.errors import UserError
from robustvlm.runs.manifest import require_shape
from robustvlm.training.history import History

NAME = "training.json"


class TrainingSummary(BaseModel):
    """The content of `training.json`, written when a training run has ended.

    Args:
        kind: the command ("finetune", "purify"); method: the loss.
        settings: choices and fitted constants of the method.
        trained_parameters, parameters: numbers of values trained and in all.
        ranks: processes that trained; best_by: the measure that chose the weights; steps: optimiser steps in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    kind: str
    method: str
    settings: dict[str, Any] = {}
    trained_parameters: int
    parameters: int
    ranks: int = 1
    best_by: str | None = None
    steps: int
    history: History


def read_training(folder: Path) -> TrainingSummary:
    """Return the summary of a finished training run; raise UserError if there is none or it is damaged."""
    advice = "delete it and give the run's command again"
    try:
        content = read_json(folder / NAME, advice=advice)
    except FileNotFoundError:
        raise UserError(f"the run '{folder}' has not ended: give its command again to go on") from None
    require_shape(TrainingSummary, content, folder / NAME, f": {advice}")
    return TrainingSummary.model_validate(content)
