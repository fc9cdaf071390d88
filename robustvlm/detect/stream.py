"""AdaNeg: negatives that are gathered from the images which come in, and kept still while an image is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect.words import NegLabel
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class AdaNeg(NegLabel):
    """NegLabel, and NegLabel with what a stream of images has shown in place of the texts.

    Every class and every negative word has a row of memory, at first its text alone. An image of the stream whose
    NegLabel share of the known classes is above `middle + gap (1 - middle)` goes into the row of its nearest class, one
    whose share is below `middle - gap middle` into that of its nearest word; of a full row the image leaves that the row
    is least sure of (largest entropy). For an image to judge, each row gives a proxy: the mean of its members, weighted
    by exp(sharpness (cosine - 1)) to that image, of unit norm. The score is the share of the known classes among the
    proxies plus `weight` times that among the texts, as the log-odds of their mean.

    *Our reading:* the paper judges and remembers at once, so that the score of an image depends on those before it. Here
    `remember` returns another detector, and `score` never changes one: it can be attacked and certified as any other.
    With nothing remembered it is NegLabel's score. The stream is unlabelled, and whoever can send images can teach it.

    Args:
        head, negatives, n_groups: as of NegLabel.
        length: members of a row, the text among them. middle, gap: which images are remembered, see above.
        sharpness: beta of the weights; 0: the plain mean. weight: lambda, of the texts' share.
        memory: unit vectors [K + M, length, D], zeros where a row has room; entropy: of each [K + M, length].

    Source: Zhang and Zhang 2024, arXiv 2410.20149 (AdaNeg), with the constants of its ImageNet runs.

    Example:
        >>> from robustvlm.detect import Head
        >>> axes = torch.eye(4)
        >>> empty = AdaNeg(Head(axes[:2], 5.0), axes[2:3])
        >>> stranger = torch.tensor([[0.0, 0.0, 0.6, 0.8]])
        >>> bool(empty.remember(stranger).score(stranger) < empty.score(stranger))
        True
    """

    length: int = 10
    middle: float = 0.5
    gap: float = 0.5
    sharpness: float = 5.5
    weight: float = 0.1
    memory: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise UserError(f"a row of AdaNeg's memory holds its text and an image at least: length >= 2, got {self.length}")
        for name, low, high in (("middle", 0.0, 1.0), ("gap", 0.0, 1.0), ("sharpness", 0.0, math.inf)):
            if not low <= getattr(self, name) <= high or getattr(self, name) == math.inf:
                raise UserError(f"{name} of AdaNeg must be in [{low:g}, {high:g}], got {getattr(self, name):g}")
        if not 0 < self.weight < math.inf:
            raise UserError(f"weight of AdaNeg must be positive, got {self.weight:g}")

    @property
    def remembered(self) -> int:
        """How many images the memory holds."""
        return 0 if self.memory is None else int((self._members(self.memory)[:, 1:].any(dim=-1)).sum())

    @torch.no_grad()
    def remember(self, features: Tensor) -> AdaNeg:
        """Return the detector after a stream of images, unit features [N, D] in the order in which they come.

        Raises:
            UserError: features that are no finite numbers [N, D].
        """
        texts = self._texts(features)
        if features.ndim != 2 or features.shape[1] != texts.shape[1] or not features.isfinite().all():
            raise UserError(f"a stream is finite features [N, {texts.shape[1]}], got {list(features.shape)}")
        memory, entropy = self._started(texts)
        share, known = self._ahead(features @ texts.T).mean_share(), len(self.head.class_embeddings)
        cosines = self.head.logit_scale * features @ texts.T
        sides = (
            (share > self.middle + self.gap * (1 - self.middle), 0, cosines[:, :known]),
            (share < self.middle - self.gap * self.middle, known, cosines[:, known:]),
        )
        for taken, first, logits in sides:
            rows, unsure = first + logits.argmax(dim=1), torch.distributions.Categorical(logits=logits).entropy()
            for i in taken.nonzero().flatten().tolist():
                _keep(memory[rows[i]], entropy[rows[i]], features[i], unsure[i])
        return replace(self, memory=memory, entropy=entropy)

    def score(self, features: Tensor) -> Tensor:
        texts = self._texts(features)
        of_texts = self._ahead(features @ texts.T)
        if self.memory is None:
            return of_texts.log_odds()
        of_memory = self._ahead(self._proxies(features))
        return of_memory.mixed(of_texts, self.weight)
