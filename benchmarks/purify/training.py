"""Purifiers and mappers for the benchmarks: trained once for every encoder and seed, found again afterwards."""

from __future__ import annotations

import re
from pathlib import Path

from robustvlm.evaluation.purifying.setup import prepare_purify
from robustvlm.runs.purify_config import PurifyConfig
from robustvlm.training.observer import TrainingObserver

SIGMAS = (0.12, 0.25, 0.5)


class Heard(TrainingObserver):
    """Prints a line now and then."""

    def stepped(self, step: int, terms: dict[str, float]) -> None:  # type: ignore[override]
        if step % 100 == 0:
            print(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in terms.items()), flush=True)


def trained(
    encoder: str,
    data: str,
    *,
    label: str,
    seed: int,
    steps: int,
    mapper_steps: int,
    out: Path,
    only: str | None = None,
    precision: str = "bf16",
) -> Path:
    """Return the run folder of a purifier and mapper for an encoder, or of one; train them if they are not there."""
    config = PurifyConfig(
        model=encoder,
        data=data,
        sigma=list(SIGMAS),
        only=only,
        steps=steps,
        mapper_steps=mapper_steps,
        batch_size=32,
        limit=10_000,
        precision=precision,
        seed=seed,
        validate_every=0,
    )
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"purify-{only or 'both'}-{label}-seed{seed}-{steps}").strip("-")
    prepared = prepare_purify(config, out=out, name=name)
    prepared.run(lambda _: Heard())
    return prepared.folder.path
