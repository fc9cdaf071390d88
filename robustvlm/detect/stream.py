"""AdaNeg: negatives gathered from the images that come in, and held still while an image is judged."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustvlm.detect.base import Detector
from robustvlm.detect.words import NegLabel, mean_log_odds
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class AdaNeg(Detector):
    """NegLabel's share among the texts, and the same among what a stream of images has shown in their place.

    Every class and every negative word has a row of memory, at first its text alone. An image of the stream whose share
    of the known classes is above middle + gap (1 - middle) joins the row of its nearest class; one whose share is below
    middle - gap middle that of its nearest word. From a full row the image goes that is least sure of it (largest
    entropy). For an image that is judged, each row gives a proxy of unit norm: the sum of its members, each times
    exp(sharpness (cosine - 1)) of its cosine to that image. The score is the share of the known classes among the
    proxies plus `weight` times that among the texts, given as the log-odds of their weighted mean.

    *Our reading:* the paper judges and remembers in one pass, so that an image's score depends on those before it. Here
    `remember` returns another detector and `score` changes none, so that it can be attacked like any other. The stream
    has no labels, and whoever may send images can teach it. With nothing remembered the score is NegLabel's.

    Args:
        texts: NegLabel with the class texts and the negative words.
        length: members of a row, the text among them. middle, gap: which images are remembered.
        sharpness: beta; 0 makes the proxy of a row the plain mean. weight: lambda, of the share among the texts.
        memory: unit vectors [K + M, length, D], zeros where a row has room. entropy: of each, [K + M, length].

    Raises:
        UserError: a setting out of range.

    Source: Zhang and Zhang 2024, arXiv 2410.20149, with the constants of its ImageNet runs.

    Example:
        >>> from robustvlm.detect import Head
        >>> axes = torch.eye(4)
        >>> empty = AdaNeg(NegLabel(Head(axes[:2], 5.0), axes[2:3]))
        >>> taught = empty.remember(torch.tensor([[0.0, 0.0, 0.6, 0.8]]))
        >>> stranger = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        >>> taught.remembered, bool(taught.score(stranger) < empty.score(stranger))
        (1, True)
    """

    texts: NegLabel
    length: int = 10
    middle: float = 0.5
    gap: float = 0.5
    sharpness: float = 5.5
    weight: float = 0.1
    memory: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"AdaNeg needs room for a text and an image in a row: length at least 2, got {self.length}")
        for name in ("middle", "gap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} of AdaNeg must be in [0, 1], got {getattr(self, name):g}")
        if not 0 <= self.sharpness < math.inf or not 0 < self.weight < math.inf:
            got = f"{self.sharpness:g} and {self.weight:g}"
            raise UserError(f"AdaNeg needs a sharpness of at least 0 and a weight above 0, got {got}")

    @property
    def remembered(self) -> int:
        """How many images the memory holds."""
        return 0 if self.memory is None else int(self.memory[:, 1:].any(dim=-1).sum())

    @torch.no_grad()
    def remember(self, features: Tensor) -> "AdaNeg":
        """Return the detector after a stream of images: unit features [N, D], in the order in which they come.

        Raises:
            UserError: features of another shape, or that are not finite.
        """
        texts = self.texts.texts.to(features)
        if features.ndim != 2 or features.shape[1] != texts.shape[1] or not features.isfinite().all():
            raise UserError(f"a stream is finite features [N, {texts.shape[1]}], got {list(features.shape)}")
        memory, entropy = self._begun(texts)
        known, cosines = len(self.texts.head.class_embeddings), features @ texts.T
        share = mean_log_odds(self.texts.ahead(cosines)).sigmoid()
        for first, side, taken in (
            (0, cosines[:, :known], share > self.middle + self.gap * (1 - self.middle)),
            (known, cosines[:, known:], share < self.middle - self.gap * self.middle),
        ):
            rows, sides = first + side.argmax(dim=1), (self.texts.head.logit_scale * side).log_softmax(dim=1)
            unsure = -(sides.exp() * sides).sum(dim=1)
            for i in taken.nonzero().flatten().tolist():
                _keep(memory[rows[i]], entropy[rows[i]], features[i], unsure[i])
        return replace(self, memory=memory, entropy=entropy)

    def score(self, features: Tensor) -> Tensor:
        of_texts = self.texts.ahead(features @ self.texts.texts.to(features).T)
        if self.memory is None:
            return mean_log_odds(of_texts)
        of_proxies = self.texts.ahead(self._cosines_to_proxies(features, self.memory.to(features)))
        weights = torch.ones(len(of_texts), dtype=features.dtype, device=features.device)
        return mean_log_odds(torch.cat([of_proxies, of_texts]), torch.cat([weights, self.weight * weights]))

    def _cosines_to_proxies(self, features: Tensor, memory: Tensor) -> Tensor:
        """Return cosines [N, K + M] to the proxy that each row has for each image, by the rows' Gram matrices."""
        cosines = torch.einsum("nd,rld->nrl", features, memory)
        # An empty place is a vector of zeros, and adds nothing to the sum whatever its weight.
        weights = (self.sharpness * (cosines - 1)).exp()
        gram = torch.einsum("rld,rmd->rlm", memory, memory)
        square = torch.einsum("nrl,rlm,nrm->nr", weights, gram, weights)
        return (weights * cosines).sum(dim=2) / square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()

    def _begun(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory and entropies to write into: a copy, or rows that hold their texts alone."""
        if self.memory is not None and self.entropy is not None:
            return self.memory.clone().to(texts), self.entropy.clone().to(texts)
        memory = torch.zeros(len(texts), self.length, texts.shape[1]).to(texts)
        memory[:, 0] = texts
        return memory, torch.full((len(texts), self.length), math.inf).to(texts)


def _keep(row: Tensor, entropy: Tensor, image: Tensor, unsure: Tensor) -> None:
    """Put an image into a row [length, D], in place: where there is room, or over the least sure one if it is less.

    The text, which is first, stays (our reading; the program marks it as the surest of all). Room is entropy inf.
    """
    least = int(entropy[1:].argmax()) + 1
    if unsure < entropy[least]:
        row[least], entropy[least] = image, unsure
