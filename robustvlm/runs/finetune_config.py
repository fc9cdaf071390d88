"""What defines a fine-tuning run: the settings that decide its weights."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class FinetuneConfig(BaseModel):
    """Every setting that the weights of a run depend on; a run is resumed only under an equal one.

    Args:
        val: the images to validate on; None: a part of `data` that is then not trained on.
        trees: files of class trees in place of the data's own, or "wordnet" or "llm"; several make a forest.
        tree_by, llm, llm_model: what a language model sorts the classes by, its endpoint and its name.
        method, options: the loss, and its own options that are not at their defaults.
        norm, eps, alpha, inner_steps: the inner attack; `eps` is the size of the attack in validations as well.
        trainable: which parameters (all, lora[:RANK], ssf, last:N); augment: name of the augmentation.
        limit, val_limit: images used of each set; val_steps: PGD steps of a validation.
        steps ... validate_every: see `robustvlm.training.TrainingConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "tiny"
    data: str
    val: str | None = None
    classes: str | None = None
    templates: str | None = None
    trees: list[str] = []
    tree_by: list[str] = []
    llm: str | None = None
    llm_model: str | None = None
    method: str = "hierarchical"
    options: dict[str, Any] = {}
    norm: str = "Linf"
    eps: float = 1 / 255
    eps_text: str = "1/255"
    alpha: float | None = None
    inner_steps: int = 3
    trainable: str = "all"
    augment: str = "crop"
    limit: int | None = None
    val_limit: int = 512
    val_steps: int = 10
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    lr: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    validate_every: float = 0.1
    device: str = "cpu"
