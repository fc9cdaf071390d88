"""What defines a detect run: the settings that decide its scores."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class NamedData(BaseModel):
    """A set of unknown images: the name that tables show, and its data spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    spec: str


class UnderAttack(BaseModel):
    """How scores are attacked.

    Args:
        scores: those that are attacked, each for its own sake.
        limit: images per set; lanes: rows of a batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: list[str]
    attack: list[str]
    norm: str
    eps: float
    eps_text: str
    limit: int
    lanes: int


class DetectConfig(BaseModel):
    """Every setting that the rows of a detect run depend on; a run is resumed only under an equal one.

    Args:
        known, fit: data of known classes, judged and learnt from; fit is None where nothing may be learnt.
        unknown: sets of unknown images.
        words: fingerprint of the words outside the known classes.
        oracle_words: words that name a class of an unknown set are kept; temperature: of energies, on the logits.
        draws: bootstrap samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    known: str
    unknown: list[NamedData]
    fit: str | None
    scores: list[str]
    words: str
    oracle_words: bool = False
    temperature: float = 1.0
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    limit: int | None
    fit_limit: int | None
    draws: int
    seed: int
    device: str
    under_attack: UnderAttack | None = None
