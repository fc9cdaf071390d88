"""What defines an immunised model: the settings that decide its prototypes, antibodies, adapter and thresholds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from robustvlm.core.defaults import LAMBDA_INF

RECORD = "immunity.json"


class ImmunizeConfig(BaseModel):
    """Every setting that the model depends on; a finished run is taken up again only under an equal one.

    Args:
        held_out: data spec, or a share of `data` (by groups of images that show the same thing).
        images: False for the zero-shot mode, from texts alone.
        shots: images a class to learn from; None: all.
        antibodies: bank, wordnet, llm, noise, none, or file:PATH. llm: the endpoint's model, for llm.
        xi: largest angle between prototype and text, degrees; None: from the data. per_class: prototypes a class.
        safe, risk: the band of antibodies, cosines; None: from the data.
        margin: m of the hinge; None: from the data. push_weight: lambda. weight: lambda_inf. kappa: model or class.
        miss: share of known images that thresholds reject. min_images: held-out images for a class's own threshold.
        sigmas: noise levels with thresholds of their own, from `noise_draws` draws an image.
        ood: data of unknown images to measure on. oracle_words: antibodies that name a class of these are kept.
        near_names: file of names that antibodies should cover.
        add_class: the class that was added to the run `model`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "tiny"
    data: str = "emoji?split=train"
    held_out: str | float = 0.2
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    images: bool = True
    shots: int | None = None
    antibodies: str = "bank"
    llm: str | None = None
    xi: float | None = None
    per_class: int = 1
    safe: float | None = None
    risk: float | None = None
    margin: float | None = 0.2
    push_weight: float = 1.0
    weight: float = LAMBDA_INF
    kappa: str = "model"
    miss: float = 0.05
    min_images: int = 30
    hidden: int = 128
    steps: int = 400
    lr: float = 3e-4
    decay: float = 0.1
    sigmas: list[float] = []
    noise_draws: int = 64
    ood: list[str] = []
    oracle_words: bool = False
    near_names: str | None = None
    add_class: str | None = None
    seed: int = 0
    device: str = "cpu"
