"""KR-NFT: NegLabel with texts that are scaled and shifted, known ones and negatives apart, learnt from few images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.detect.base import FittedDetector, check_known
from robustvlm.detect.words import NegLabel, mean_log_odds
from robustvlm.errors import UserError

# A text feature mapped to nothing has no direction: keeps the root's gradient finite.
_TINY = 1e-12

# Scale and shift of text features, given an image


@dataclass(frozen=True, eq=False)
class TextMap:
    """t -> s(z) * t + b(z), entry by entry; s and b are a vector each, plus a small network of the image feature z.

    There are four of both, in this order: the scale of known texts, that of negatives, the shift of known texts, that
    of negatives. The networks have one hidden layer (ReLU) and end in zeros, so that the map begins as the identity.

    Args:
        base: the vectors [4, D]. inner, inner_bias: first layers [4, H, D] and [4, H]; H may be 0, for no network.
            outer, outer_bias: second layers [4, D, H] and [4, D].

    Source: KR-NFT, arXiv 2507.19847.

    Example:
        >>> start = TextMap.identity(3, hidden=2, seed=0)
        >>> start.at(torch.rand(5, 3))[:, 0]
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [0., 0., 0.],
                [0., 0., 0.]])
    """

    base: Tensor
    inner: Tensor = field(repr=False)
    inner_bias: Tensor = field(repr=False)
    outer: Tensor = field(repr=False)
    outer_bias: Tensor = field(repr=False)

    @classmethod
    def identity(cls, dim: int, *, hidden: int, seed: int) -> TextMap:
        """Return the map that changes nothing; first layers are drawn by the seed, uniform within 1 / sqrt(dim)."""
        draws = generator(seed, "krnft networks")
        bound = 1 / math.sqrt(dim)
        inner = bound * (2 * torch.rand(4, hidden, dim, generator=draws) - 1)
        inner_bias = bound * (2 * torch.rand(4, hidden, generator=draws) - 1)
        base = torch.ones(4, dim)
        base[2:] = 0.0
        return cls(base, inner, inner_bias, torch.zeros(4, dim, hidden), torch.zeros(4, dim))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that is learnt."""
        return self.base, self.inner, self.inner_bias, self.outer, self.outer_bias

    def at(self, features: Tensor) -> Tensor:
        """Return scales and shifts [4, N, D] for image features [N, D]."""
        base, inner, inner_bias, outer, outer_bias = (part.to(features) for part in self.parts)
        hidden = (torch.einsum("nd,ihd->inh", features, inner) + inner_bias[:, None]).relu()
        return (base + outer_bias)[:, None] + torch.einsum("inh,idh->ind", hidden, outer)


def mapped_cosines(views: Tensor, texts: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines of views to scaled and shifted texts, and of these to the texts that they were.

    Nothing of the size of images times texts times dimensions is made.

    Args:
        views: unit features [N, C, D] of C views of each image; texts: unit features [K, D].
        scale, shift: of the texts, for each image [N, D].

    Returns:
        Cosines [N, C, K] and [N, K].

    Example:
        >>> views, one = torch.tensor([[[0.6, 0.8]]]), torch.ones(1, 2)
        >>> mapped_cosines(views, torch.eye(2), torch.tensor([[2.0, 1.0]]), 0 * one)[0]
        tensor([[[0.6000, 0.8000]]])
        >>> mapped_cosines(views, torch.eye(2), one, one)[1]
        tensor([[0.8944, 0.8944]])
    """
    dots = (views * scale[:, None]) @ texts.T + (views * shift[:, None]).sum(dim=2, keepdim=True)
    to_itself = scale @ texts.square().T + shift @ texts.T
    square = scale.square() @ texts.square().T + 2 * (scale * shift) @ texts.T
    length = (square + shift.square().sum(dim=1, keepdim=True)).clamp_min(_TINY).sqrt()
    return dots / length[:, None], to_itself / length


# The score, and how it learns


@dataclass(frozen=True, eq=False)
class KRNFT(FittedDetector):
    """NegLabel's share of the known classes, with texts t -> s(z) * t + b(z): one map for classes, one for negatives.

    Of each image that teaches there are random crops: the quarter nearest to the text of its class is to show the
    class, the farthest quarter (background, as a rule) nothing that is known. With P the share of the known classes in
    a group of negatives, the loss is the mean over images, crops and groups of

        CE(class among known classes and the group; near crops) + w_n log P(far crops) + w_k (1 - mean cos(t', t)),

    the last mean over all texts (knowledge regularisation); the first term is CE among the classes plus -log P. Texts
    and encoder stay as they are; the map is what is learnt, by AdamW at a constant rate. While learning it is given the
    nearest crop of an image, later the image. With no epoch the score is NegLabel's.

    *Our reading:* several images make a batch (the authors take one). `fit(features, labels)` knows whole images alone:
    each is its own near crop, and the term of far crops is absent; `fit_crops` is the paper's. The authors shuffle the
    negatives and leave out what does not divide; here they are dealt out in turn, as in `NegLabel`.

    Args:
        texts: NegLabel with the class texts, the negatives and their groups (the paper's are 10, of about as many as
            there are classes).
        negative_weight, knowledge_weight: w_n and w_k; the authors' are .3 and 10. Known classes that were left out
            in turn chose .03 on drawings and 0 on photographs for w_n, where .3 cost much.
        hidden: units of the small networks of the image (the authors' 64); 0 for none, s and b being vectors alone.
        epochs, batch_size, lr: of the learning, in images; a rate of .001 gains more where few of a model's words fit
            its images, and loses where they fit.
        seed: of the order of images and of the networks.
        map: what was learnt.

    Raises:
        UserError: a setting out of range.

    Source: Zhu et al. 2025, arXiv 2507.19847, and the authors' program (github.com/ZhuWenjie98/KRNFT).

    Example:
        >>> from robustvlm.detect import Head
        >>> texts = NegLabel(Head(torch.eye(4)[:2], 10.0), torch.eye(4)[2:])
        >>> rows = F.normalize(torch.tensor([[1.0, 0.0, 0.6, 0.1], [0.0, 1.0, 0.6, 0.1]]), dim=1)
        >>> fitted = KRNFT(texts).fit(rows, torch.tensor([0, 1]))
        >>> bool((fitted.predict(rows) > texts.predict(rows)).all())
        True
    """

    texts: NegLabel
    negative_weight: float = 0.03
    knowledge_weight: float = 10.0
    hidden: int = 64
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-4
    seed: int = 0
    map: TextMap | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("hidden", 0), ("epochs", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} of KR-NFT must be at least {least}, got {getattr(self, name)}")
        for name in ("negative_weight", "knowledge_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} of KR-NFT must be at least 0, got {getattr(self, name):g}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr of KR-NFT must be positive, got {self.lr:g}: pass for example 0.0001")

    def fit_features(self, features: Tensor, labels: Tensor) -> KRNFT:
        check_known(features, labels)
        return self.fit_crops(features[:, None], labels)

    def fit_crops(self, crops: Tensor, labels: Tensor) -> KRNFT:
        """Return the score fitted to crops of images of known classes.

        Args:
            crops: unit features [N, C, D] of C random crops of each image; one alone may be the whole image.
            labels: classes [N] of the images.

        Raises:
            UserError: nothing to learn from, values that are not finite, or a label that is no class of the head.
        """
        if crops.ndim != 3 or not crops.shape[1]:
            raise UserError(f"crops of images are features [N, at least 1, D], got {list(crops.shape)}")
        check_known(crops.flatten(1), labels)
        known, dim = self.texts.head.class_embeddings.shape
        if crops.shape[2] != dim:
            raise UserError(f"crops have {crops.shape[2]} dimensions, the class embeddings {dim}")
        if int(labels.max()) >= known:
            raise UserError(f"labels go up to {int(labels.max())}, and the head has {known} classes")
        # Batches are drawn from one order of the images, whatever order they come in.
        order = sorted(range(len(labels)), key=lambda row: (int(labels[row]), crops[row, 0].tolist()))
        crops, labels = crops[order], labels[order]
        start = TextMap.identity(dim, hidden=self.hidden, seed=self.seed)
        with torch.enable_grad():  # a caller's no_grad must not stop the learning
            learnt = self._learnt(start, crops.detach(), labels.to(crops.device))
        return replace(self, map=learnt)

    def _learnt(self, start: TextMap, crops: Tensor, labels: Tensor) -> TextMap:
        parts = [part.to(crops).requires_grad_() for part in start.parts]
        optimizer = torch.optim.AdamW(parts, lr=self.lr)
        for epoch in range(self.epochs):
            order = torch.randperm(len(crops), generator=generator(self.seed, "krnft order", epoch)).to(crops.device)
            for rows in order.split(self.batch_size):
                loss = self.terms(crops[rows], labels[rows], TextMap(*parts))["loss"]
                if not loss.isfinite():
                    raise UserError(f"the loss of KR-NFT is {loss.item()} in epoch {epoch + 1}: pass a smaller lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return TextMap(*(part.detach() for part in parts))

    def terms(self, crops: Tensor, labels: Tensor, at: TextMap) -> dict[str, Tensor]:
        """Return the terms of the loss by name, `loss` their weighted sum, of crops [N, C, D] with labels [N]."""
        near, far = split_crops(crops, self.texts.head.class_embeddings.to(crops)[labels])
        cosines, kept = self._cosines(near, near[:, 0], at)
        known = self.texts.head.logit_scale * cosines[..., : len(self.texts.head.class_embeddings)]
        wanted = labels[:, None].expand(near.shape[:2])
        among = F.cross_entropy(known.flatten(0, 1), wanted.flatten())
        terms = {"near": among - F.logsigmoid(self.texts.ahead(cosines.flatten(0, 1))).mean(), "kept": 1 - kept.mean()}
        loss = terms["near"] + self.knowledge_weight * terms["kept"]
        if far.shape[1] and self.negative_weight:
            cosines, _ = self._cosines(far, near[:, 0], at)
            terms["far"] = F.logsigmoid(self.texts.ahead(cosines.flatten(0, 1))).mean()
            loss = loss + self.negative_weight * terms["far"]
        return terms | {"loss": loss}

    def _cosines(self, views: Tensor, given: Tensor, at: TextMap) -> tuple[Tensor, Tensor]:
        """Return cosines [N, C, K + M] of views to the texts mapped for `given` [N, D], and of these to the texts."""
        classes = self.texts.head.class_embeddings.to(views)
        scale_known, scale_others, shift_known, shift_others = at.at(given)
        known = mapped_cosines(views, classes, scale_known, shift_known)
        others = mapped_cosines(views, self.texts.negatives.to(views), scale_others, shift_others)
        return torch.cat([known[0], others[0]], dim=2), torch.cat([known[1], others[1]], dim=1)

    def cosines(self, features: Tensor) -> Tensor:
        """Return cosines [N, K + M] of unit features [N, D] to the classes and the negatives, mapped for each image."""
        return self._cosines(features[:, None], features, self.learnt(self.map))[0][:, 0]

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, K] of the mapped class texts, a classifier beside the zero-shot one."""
        return self.texts.head.logit_scale * self.cosines(features)[:, : len(self.texts.head.class_embeddings)]

    def score(self, features: Tensor) -> Tensor:
        return mean_log_odds(self.texts.ahead(self.cosines(features)))


def split_crops(crops: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quarter of the crops of each image nearest to its text, the nearest first, and the farthest quarter.

    A quarter is at least one crop; of a single crop nothing is far.

    Args:
        crops: unit features [N, C, D]; texts: unit features [N, D], of the class of each image.

    Example:
        >>> near, far = split_crops(torch.eye(2)[None], torch.tensor([[0.6, 0.8]]))
        >>> near.tolist(), far.tolist()
        ([[[0.0, 1.0]]], [[[1.0, 0.0]]])
    """
    order = torch.einsum("ncd,nd->nc", crops, texts).argsort(dim=1, descending=True, stable=True)
    ranked = crops.gather(1, order[:, :, None].expand_as(crops))
    count = max(1, crops.shape[1] // 4)
    return ranked[:, :count], ranked[:, max(count, crops.shape[1] - count) :]
