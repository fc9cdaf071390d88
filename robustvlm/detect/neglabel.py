"""NegLabel: how much more an image looks like the known classes than like words far from all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect.base import Detector, Head
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class NegLabel(Detector):
    """The softmax share of the known classes among classes and negative words, as log-odds.

    The words are dealt out into groups; each group has its own share, and the score is their mean.

    Args:
        head: the zero-shot head, whose logit_scale is the inverse of the temperature (the paper's is 100).
        negatives: unit text embeddings [M, D] of the words; `mine_negatives` chooses them.
        n_groups: into how many groups the words are dealt out, one after the other (our reading: the paper deals them
            out at random); at most one per word.

    Source: Jiang et al. 2024, arXiv 2403.20078.

    Example:
        >>> NegLabel(Head(torch.eye(3)[:2], 1.0), torch.eye(3)[2:]).score(torch.tensor([[1.0, 0.0, 0.0]])).sigmoid()
        tensor([0.7881])
    """

    head: Head
    negatives: Tensor
    n_groups: int = 1

    def __post_init__(self) -> None:
        if self.negatives.ndim != 2 or not len(self.negatives):
            raise UserError(f"NegLabel needs embeddings of negative words [at least 1, D], got {self.negatives.shape}")
        if not 1 <= self.n_groups <= len(self.negatives):
            raise UserError(f"{len(self.negatives)} negative words make 1 to that many groups, got {self.n_groups}")

    def score(self, features: Tensor) -> Tensor:
        known = self.head.logits(features).logsumexp(dim=1)
        others = self.head.logit_scale * features @ self.negatives.to(features).T
        ahead = torch.stack([known - others[:, g :: self.n_groups].logsumexp(dim=1) for g in range(self.n_groups)])
        # Log-odds of the mean share, without leaving the logarithm: shares near 1 would round to a tie.
        return F.logsigmoid(ahead).logsumexp(dim=0) - F.logsigmoid(-ahead).logsumexp(dim=0)


def mine_negatives(words: Tensor, class_embeddings: Tensor, *, share: float = 0.15, percentile: float = 95.0) -> Tensor:
    """Return the rows [M] (int64, ascending) of the words that lie farthest from the known classes.

    A word's nearness is the given percentile of its cosines to the classes, so that one odd class does not decide; the
    `share` of words with the smallest is kept, one at least.

    Args:
        words: unit text embeddings [W, D] of the candidates; class_embeddings: those of the known classes [K, D].

    Source: arXiv 2403.20078, algorithm 1 (NegMining), with its defaults.

    Example:
        >>> mine_negatives(torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]]), share=0.4)
        tensor([2])
    """
    if not 0 < share <= 1 or not 0 <= percentile <= 100:
        raise UserError(f"need 0 < share <= 1 and a percentile up to 100, got {share} and {percentile}")
    nearness = torch.quantile((words @ class_embeddings.T).double(), percentile / 100, dim=1)
    keep = max(1, round(share * len(words)))
    return nearness.argsort(stable=True)[:keep].sort().values
