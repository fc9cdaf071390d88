"""The numbers and words of a certify command, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustvlm.attacks import PRECISIONS
from robustvlm.certify.claims import DEFAULT, find_claim
from robustvlm.certify.limits import N_MAX
from robustvlm.certify.normal import check_alpha, check_sigma
from robustvlm.core.defaults import LAMBDA_INF
from robustvlm.defenses.smoothing import MAX_N0, MAX_SIGMA
from robustvlm.errors import UserError, nearest

DEFAULT_SIGMA = 0.25
DEFAULT_ALPHA, MAX_ALPHA = 0.001, 0.5
_AT_SIGMAS = (0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a command says; see `robustvlm certify --help` for the meaning of each."""

    model: str = "tiny"
    data: str = "emoji"
    classes: Path | None = None
    templates: Path | None = None
    tree: Path | None = None
    claim: str = DEFAULT
    sigma: float | None = None
    samples: int = 10_000
    alpha: float | None = None
    min_cos: float = 0.5
    radius: float | None = None
    at: str | None = None
    tau: float | None = None
    antibodies: Path | None = None
    weight: float = LAMBDA_INF
    deployed: int | None = None
    cache: str | None = None
    limit: int | None = None
    seed: int = 0
    lanes: int | None = None
    device: str = "auto"
    precision: str = "fp32"

    def checked(self, *, refuses: bool = False) -> Settings:
        """Return the settings if they make sense on their own; raise a UserError that says what does not.

        Args:
            refuses: the model has prototypes, antibodies and thresholds of its own.
        """
        claim = find_claim(self.claim)
        if self.alpha is not None and check_alpha(self.alpha) > MAX_ALPHA:
            raise UserError(f"--alpha is an error probability, at most {MAX_ALPHA:g}, got {self.alpha}: pass 0.001")
        if self.sigma is not None and check_sigma(self.sigma) > MAX_SIGMA:
            raise UserError(
                f"--sigma is at most {MAX_SIGMA:g}, got {self.sigma:g} (pixels are in [0, 1], so 0.25 is strong noise)"
            )
        _positive("--radius", self.radius)
        for name, number, least, most in (
            ("--samples", self.samples, 2, N_MAX),
            ("--limit", self.limit, 1, None),
            ("--lanes", self.lanes, 1, N_MAX),
            ("--deployed", self.deployed, 1, MAX_N0),
            ("--seed", self.seed, 0, None),
        ):
            if number is not None and number < least:
                raise UserError(f"{name} must be at least {least}, got {number}")
            if number is not None and most is not None and number > most:
                raise UserError(f"{name} must be at most {most:,}, got {number:,}")
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown precision '{self.precision}': {nearest(self.precision, PRECISIONS)}")
        claim.check(self, refuses=refuses)
        self._check_cache()
        return self

    def _check_cache(self) -> None:
        if self.cache is None:
            return
        if self.cache not in ("float16", "float32"):
            raise UserError(f"--cache keeps float16 or float32, got '{self.cache}'")
        if self.radius is not None:
            raise UserError("--cache keeps a number of samples that was fixed beforehand: leave out --radius")

    def radii(self, sigma: float) -> list[float]:
        """Return the radii at which the summary counts certified images."""
        if self.at is None:
            chosen = {round(sigma * part, 6) for part in _AT_SIGMAS}
            return sorted(chosen | ({self.radius} if self.radius is not None else set()))
        try:
            values = [float(part) for part in self.at.split(",")]
        except ValueError:
            raise UserError(f"cannot read the radii '{self.at}': expected numbers, as 0.1,0.25,0.5") from None
        for value in values:
            _positive("--at", value)
        return sorted(set(values))

    def with_source(self, config: dict[str, Any]) -> Settings:
        """Return these settings with those of the run whose kept features are judged.

        Raises:
            UserError: another alpha: an error probability chosen after a look at the samples is none.
        """
        if self.alpha not in (None, config["alpha"]):
            raise UserError(
                f"the error probability of kept features is that of their run, {config['alpha']}: leave out --alpha, "
                "or sample anew"
            )
        return replace(
            self,
            alpha=config["alpha"],
            model=config["model"],
            data=config["data"],
            sigma=config["sigma"],
            samples=config["samples"],
            limit=config["limit"],
            seed=config["seed"],
            precision=config["precision"],
        )


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0.0 and math.isfinite(value)):
        raise UserError(f"{name} must be a positive number, got {value}")
