"""What defines a run of prompt tuning: the settings that decide its prompts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

RECORD = "prompts.json"


class PromptConfig(BaseModel):
    """Every setting that the prompts depend on; a finished run is taken up again only under an equal one.

    `energy_weight` is lambda of the energy term, None for CoOp without the EBM terms; `n_reset` is c, how many of the
    largest cosines the energy change as a detection score sets to 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    classes: str | None = None
    val: str | None = None
    ood: list[str] = []
    shots: int | None = 16
    context: int = 4
    start: str = "a picture of a"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.01
    energy_weight: float | None = 10.0
    n_reset: int = 2
    seed: int = 0
    device: str = "cpu"
