"""Rows paid for each row that counts, with and without what the engine does where few images are left in an attack.

python -m benchmarks.spare_rows

A made-up smooth model whose batches of 16 rows and more give the same bits, as kernels with AVX-512 do; images that it
gets right, attacked until they fall. Rows are counted, so the table is the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from robustvlm.attacks import FOOLED, Job, LaneAttack, LaneEngine, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.pool import Pool
from robustvlm.attacks.square import Square
from robustvlm.core.batches import SteadySizes

PLAN = "apgd-ce:steps=30,apgd-t:steps=30,fab-t:steps=30,square:queries=300"


class Smooth(nn.Module):
    """Two curved layers over ten classes; below 16 rows its last bits are others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.Tanh(), nn.Linear(40, 10)).double()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, 10] of images [B, 3, 8, 8]."""
        logits = self.layers(4 * x.double())
        return logits if len(x) >= 16 else logits * (1 + 1e-12)


def jobs(count: int) -> list[Job]:
    """Return images with their likeliest class as the label and the nine others as targets."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ranked = Smooth()(torch.cat([images, images[:1].expand(16, -1, -1, -1)])).argsort(1, descending=True)
    rows = zip(images, ranked.tolist(), strict=False)
    return [Job(str(i), i, x, classes[0], tuple(classes[1:])) for i, (x, classes) in enumerate(rows)]


@contextmanager
def plain() -> Iterator[None]:
    """Let nothing run ahead or be foreseen, and use only the batch sizes that are known beforehand."""
    with (
        patch.object(Pool, "_ahead", lambda *_: []),
        patch.object(Square, "foresee", lambda *_: None),
        patch.object(SteadySizes, "worth_trying", lambda *_: None),
    ):
        yield


def cost(
    images: int, threat: ThreatModel, sizes: tuple[int, ...], *, apart: bool, plan: str = PLAN
) -> tuple[int, int, list[int]]:
    """Return the rows that count, those that were paid, and how many images were left after each attack.

    Args:
        apart: each attack has the batches to itself; otherwise those that take gradients share them.
        plan: the attacks, three with gradients and one without.
    """
    oracle, left, counted, remaining = Oracle(Smooth(), precision="fp64"), jobs(images), 0, []
    attacks = [attack for attack in parse_attacks(plan) if isinstance(attack, LaneAttack)]
    for group in [[attack] for attack in attacks] if apart else [attacks[:3], attacks[3:]]:
        engine = LaneEngine(oracle, group[0], threat, lanes=sizes[0], seed=0, rungs=SteadySizes(sizes), then=group[1:])
        results = list(engine.run(left))
        counted += sum(result.passes for result in results)
        for attack in group:
            of = {result.job.index: result for result in results if result.attack == attack.name}
            left = [job for job in left if of[job.index].outcome != FOOLED]
            left = [replace(job, beyond={**job.beyond, **of[job.index].beyond}) for job in left]
            remaining.append(len(left))
    return counted, oracle.passes.forward + oracle.passes.backward, remaining


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="24,40,64,200")
    parser.add_argument("--plan", default=PLAN, help="three attacks with gradients and one without")
    given = parser.parse_args()
    counts = [int(text) for text in given.images.split(",")]
    print("| images | norm | sizes known | left | rows that count | paid before | factor | paid now | factor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for threat in (ThreatModel("Linf", 0.02), ThreatModel("Linf", 0.004), ThreatModel("L2", 0.1)):
        for images in counts:
            for sizes in ((min(images, 64),), (64, 32, 16)):
                counted, now, left = cost(images, threat, sizes, apart=False, plan=given.plan)
                with plain():
                    same, before, left_before = cost(images, threat, sizes, apart=True, plan=given.plan)
                assert (counted, left) == (same, left_before), "answers or their counts have changed"
                about = (
                    f"{images} | {threat.norm} {threat.eps:g} | {', '.join(map(str, sizes))} | {left[-1]} of {images}"
                )
                paid = f"{counted:,} | {before:,} | {before / counted:.2f} | {now:,} | {now / counted:.2f}"
                print(f"| {about} | {paid} |", flush=True)


if __name__ == "__main__":
    main()
