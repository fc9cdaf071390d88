"""An ensemble of heads: the zero-shot one, a linear probe, and any others, by the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.detect.base import FittedDetector, Head, check_known, confidence
from robustvlm.detect.probe import LinearProbe, fit_probe


@dataclass(frozen=True, eq=False)
class COOkeD(FittedDetector):
    """Maximum softmax probability of the mean of the heads' probabilities, as log-odds.

    The paper's third head, a network trained for the known classes, is left out where there is none (our reading):
    `mean_probabilities` takes any number of heads.

    Args:
        head: the zero-shot head, at the model's own temperature.
        strength: inverse penalty of the linear probe.

    Source: Humblot-Renaux et al. 2025, arXiv 2507.22576.

    Example:
        >>> features = torch.eye(2).repeat(10, 1)
        >>> detector = COOkeD(Head(torch.eye(2), 10.0)).fit_features(features, torch.arange(20) % 2)
        >>> sure, unsure = detector.score(torch.tensor([[1.0, 0.0], [0.7, 0.7]]))
        >>> bool(sure > unsure)
        True
    """

    head: Head
    strength: float = 10.0
    probe: LinearProbe | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> COOkeD:
        check_known(features, labels)
        n_classes = len(self.head.class_embeddings)
        return replace(self, probe=fit_probe(features, labels, n_classes, strength=self.strength))

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return the ensemble's log-probabilities [N, K]; it is a classifier too."""
        return mean_probabilities([self.head.logits(features), self.learnt(self.probe).logits(features)])

    def score(self, features: Tensor) -> Tensor:
        return confidence(self.log_probabilities(features))


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean softmax of several heads' logits, each [N, K] -> [N, K].

    Example:
        >>> mean_probabilities([torch.zeros(1, 2), torch.tensor([[0.0, -50.0]])]).exp()
        tensor([[0.7500, 0.2500]])
    """
    return torch.stack([each.log_softmax(dim=1) for each in logits]).logsumexp(dim=0) - math.log(len(logits))
