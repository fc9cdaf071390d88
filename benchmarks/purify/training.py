"""Purifiers and mappers for the benchmarks: trained once for every encoder and seed, found again afterwards."""

from __future__ import annotations

import re
from pathlib import Path

from robustvlm.commands.purify import PURIFY
from robustvlm.runs.settings import Observer

SIGMAS = (0.12, 0.25, 0.5)


class Heard(Observer):
    """Prints a line now and then."""

    step = 0

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        del title, total
        self.step = done

    def advance(self, count: int = 1, **shown: str) -> None:
        self.step += count
        if self.step % 100 == 0:
            print(f"step {self.step}  " + "  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


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
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"purify-{only or 'both'}-{label}-seed{seed}-{steps}").strip("-")
    lengths = {} if only == "mapper" else {"steps": steps}
    lengths |= {} if only == "purifier" else {"mapper_steps": mapper_steps}
    run = PURIFY.start(
        observer=Heard(),
        out=out,
        name=name,
        model=encoder,
        data=data,
        sigma=list(SIGMAS),
        only=only,
        batch_size=32,
        limit=10_000,
        precision=precision,
        seed=seed,
        validate_every=0,
        **lengths,
    )
    return run.folder
