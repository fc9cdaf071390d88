"""Your own score for telling known from unknown images: higher means more likely known.

    robustvlm detect tiny --scores mcm,own_score:agreement --fit none --limit 50

run in this folder.
"""

from dataclasses import dataclass

from torch import Tensor

from robustvlm.detect import Detector, Head, Supplies


@dataclass(frozen=True, eq=False)
class Agreement(Detector):
    """How much of the confidence falls on few classes: the sum of squared probabilities."""

    head: Head

    def score(self, features: Tensor) -> Tensor:
        """Return [B] for unit features [B, D]; differentiable, so that `--under-attack` can attack it."""
        return self.head.logits(features).softmax(dim=1).square().sum(dim=1)


def agreement(supplies: Supplies) -> Agreement:
    """Return the score, made from what there is: the zero-shot head, features of known images, words."""
    return Agreement(supplies.head)
