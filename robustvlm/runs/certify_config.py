"""What defines a certify run: the settings that decide its certificates."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from robustvlm.certify.claims import require_known
from robustvlm.errors import UserError

CacheType = Literal["float16", "float32"]
Prompts = Literal["independent", "adaptive"]


class CertifyConfig(BaseModel):
    """Every setting that the rows of a certify run depend on; a run is resumed only under an equal one.

    Args:
        claim: a name of `robustvlm.certify.claims.CLAIMS`, or `module:callable`.
        samples: noisy copies per image at most, `n_pilot` of them for choices (label, direction, side).
        radius: certify at this radius and stop as soon as that is decided; None: the largest radius, all samples.
        at: radii at which the summary counts certified images.
        tau, antibodies, weight: threshold, file of antibody texts and their weight, for open-set claims.
        deployed: samples of the deployed smoother whose bound is shown beside the ideal one; those of MODEL+smooth if
            that is what is certified.
        noise: digest of all that decides the certificates, from which the noise is drawn beside the seed; None in runs
            from before it was, whose noise followed from seed and image alone.
        cache: number type in which noisy features are kept.
        source: fingerprint of the run whose kept features are judged instead of new ones.
        prompts: for kept features: whether the prompts were fixed without looking at what the features gave.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    claim: str
    sigma: float
    samples: int
    n_pilot: int
    alpha: float
    min_cos: float | None = None
    radius: float | None = None
    at: list[float]
    tau: float | None = None
    antibodies: str | None = None
    weight: float = 0.0
    deployed: int | None = None
    cache: CacheType | None = None
    source: str | None = None
    prompts: Prompts | None = None
    limit: int | None
    seed: int
    lanes: int
    device: str
    precision: str
    resolution: int
    noise: str | None = None

    @field_validator("claim")
    @classmethod
    def _known(cls, claim: str) -> str:
        try:
            return require_known(claim)
        except UserError as error:
            raise ValueError(str(error)) from None
