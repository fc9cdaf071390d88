"""Refusal: a classifier that rejects what it is not sure of."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from robustvlm.defenses.base import Classifier
from robustvlm.defenses.pipeline import Operation, split_spec
from robustvlm.errors import UserError
from robustvlm.models import VLM


class Refusing(Classifier):
    """A classifier that rejects what it is not sure of: accepted iff the largest softmax probability exceeds T.

    Maximum concept matching, Ming et al. 2022 (arXiv 2211.13445), at the model's own temperature. The acceptance score
    is logit(p) - logit(T) for the largest probability p, computed as the leading logit less the log-sum-exp of the
    others: it has the sign of p - T, and, unlike p, a gradient also where p is 1 up to rounding.

    Example:
        >>> from robustvlm.defenses.base import ZeroShot
        >>> from robustvlm.models import load_model, zero_shot
        >>> inner = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> Refusing(inner, 0.9)(torch.rand(5, 3, 64, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: Classifier, threshold: float) -> None:
        super().__init__(
            spec=f"{inner.spec}+reject:{threshold:g}",
            class_names=inner.class_names,
            logit_scale=inner.logit_scale,
            can_reject=True,
            **inner.framing.options(),
        )
        self.inner, self.threshold = inner, threshold

    @property
    def vlm(self) -> VLM | None:
        return self.inner.vlm

    @property
    def class_embeddings(self) -> Tensor | None:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        text = f"{self.inner.fingerprint} reject {self.threshold!r}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the acceptance score, [B, K + 1]."""
        logits = self.inner(pixels)
        return torch.cat([logits, acceptance(logits, self.threshold)[:, None]], dim=1)


def acceptance(logits: Tensor, threshold: float) -> Tensor:
    """Return log-odds of the largest softmax probability less the log-odds of `threshold`, [B, K] -> [B].

    Example:
        >>> acceptance(torch.tensor([0.6, 0.3, 0.1]).log()[None], 0.6).abs() < 1e-6
        tensor([True])
    """
    leading, index = logits.max(dim=1)
    others = logits.scatter(1, index[:, None], float("-inf")).logsumexp(dim=1)
    return leading - others - math.log(threshold / (1 - threshold))


def split_rejection(spec: str) -> tuple[str, float | None]:
    """Split `MODEL+reject:T` into the model and the threshold, None where nothing is rejected."""
    base, operations = split_spec(spec)
    if not any(operation.name == "reject" for operation in operations):
        return spec, None
    *before, last = operations
    if last.name != "reject" or any(operation.name == "reject" for operation in before):
        raise UserError(f"'+reject:T' must be the last operator of '{spec}' and stand there once")
    return "+".join([base, *map(str, before)]), _threshold(last)


def _threshold(operation: Operation) -> float:
    try:
        (text,) = operation.arguments
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"'+{operation}' must be written +reject:T with a probability 0 < T < 1, as +reject:0.5")
    return value
