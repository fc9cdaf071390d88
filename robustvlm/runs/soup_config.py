"""What defines a soup: the settings that decide its weights."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SoupConfig(BaseModel):
    """Every setting that the weights of a soup depend on.

    Args:
        model: spec of the first of `models`; models: what is averaged.
        method: "uniform" or "greedy"; by: the measure that greedy goes by, "robust" or "clean".
        data: images to measure on; None for a uniform soup that is not measured.
        norm, eps, val_steps: the attack of the measure; limit: how many images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    models: list[str]
    method: str = "uniform"
    by: str = "robust"
    data: str | None = None
    classes: str | None = None
    templates: str | None = None
    norm: str = "Linf"
    eps: float = 1 / 255
    eps_text: str = "1/255"
    val_steps: int = 10
    limit: int = 512
    device: str = "cpu"
