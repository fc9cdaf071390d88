"""LAPT: prompts with a context for the classes and another for words outside them, learnt from mixed features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.core.seeds import generator
from robustvlm.defenses.prompts import PromptLearner
from robustvlm.detect.words import mine_negatives
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings


@dataclass(frozen=True, eq=False)
class Negatives:
    """Words outside the classes: their names, and unit embeddings [M, D] with hand-written prompts."""

    words: tuple[str, ...]
    embeddings: Tensor


def farthest_words(vlm: VLM, words: Sequence[str], templates: Sequence[str], class_texts: Tensor) -> Negatives:
    """Return the words that lie farthest from the classes, as NegLabel takes them (15 % of all, `mine_negatives`).

    Args:
        class_texts: unit embeddings [K, D] of the classes with hand-written prompts.

    Raises:
        UserError: no word at all.
    """
    if not words:
        raise UserError("LAPT needs words outside the classes: pass a file of them")
    found = class_embeddings(vlm, words, templates).float().cpu()
    rows = mine_negatives(found, class_texts.to(found))
    return Negatives(tuple(words[row] for row in rows.tolist()), found[rows])


class NegativePrompts(nn.Module):
    """Embeddings of "[v_1] ... [v_M] CLASS." and of "[u_1] ... [u_M] WORD.", the contexts v and u both learnt.

    Args:
        known, negatives: learners of the two contexts, on the same text tower.

    Example:
        >>> from robustvlm.models import load_model
        >>> vlm = load_model("tiny")
        >>> few = {"length": 2, "start": "a picture", "seed": 0}
        >>> both = NegativePrompts(PromptLearner(vlm, ["apple", "dog"], **few), PromptLearner(vlm, ["sea"], **few))
        >>> tuple(both().shape), len(list(both.parameters()))
        ((3, 192), 2)
    """

    def __init__(self, known: PromptLearner, negatives: PromptLearner) -> None:
        super().__init__()
        self.known, self.negatives = known, negatives

    @property
    def context(self) -> Tensor:
        """The context vectors [M, W] of the classes."""
        return self.known.context

    def forward(self) -> Tensor:
        """Return unit embeddings [K + M, D] of the classes, then of the words; differentiable in both contexts."""
        return torch.cat([self.known(), self.negatives()])


def mixing_loss(
    features: Tensor,
    labels: Tensor,
    words: Tensor,
    *,
    texts: Tensor,
    fixed: Tensor,
    scale: float,
    shares: tuple[float, float],
) -> dict[str, Tensor]:
    """Return the terms of the loss by name, `loss` their sum: cross-entropies over classes and words together.

    Cross-modal mixing: points a z + (1 - a) t between an image and the text of its class, and the words' texts, are to
    be told. Cross-distribution mixing: points b z + (1 - b) t between an image and a word are to be both by these
    shares. Mixed points are scaled to unit norm.

    *Our reading:* the authors have images of the negative words too, found by search or made from their names; here
    the hand-written text of a word stands for its image.

    Args:
        features: unit image features [N, D]; labels: their rows in `texts` [N]. words: rows of the words drawn [N].
        texts: learnt embeddings [K + M, D]; fixed: those of hand-written prompts.
        scale: factor on cosines. shares: a and b, in [0, 1].

    Source: Zhang et al. 2024, arXiv 2407.08966, and the authors' program (github.com/YBZh/OpenOOD-VLM), in which a and
    b are uniform, one for each batch.

    Example:
        >>> image, axes, both = torch.tensor([[1.0, 0.0, 0.0]]), torch.eye(3), (torch.tensor([0]), torch.tensor([2]))
        >>> terms = mixing_loss(image, *both, texts=axes, fixed=axes, scale=20.0, shares=(1.0, 1.0))
        >>> bool(terms["loss"] < 1e-6)
        True
    """
    modal, between = shares
    own = F.normalize(modal * features + (1 - modal) * fixed[labels], dim=1)
    told = F.cross_entropy(scale * torch.cat([own, fixed[words]]) @ texts.T, torch.cat([labels, words]))
    logits = scale * F.normalize(between * features + (1 - between) * fixed[words], dim=1) @ texts.T
    shared = between * F.cross_entropy(logits, labels) + (1 - between) * F.cross_entropy(logits, words)
    return {"cross_modal": told, "cross_distribution": shared, "loss": told + shared}


def mixing(
    learner: NegativePrompts, fixed: Tensor, *, scale: float, seed: int
) -> Callable[[Tensor, Tensor, int], dict[str, Tensor]]:
    """Return the loss of a batch (features [N, D], labels [N], number of the step) that `prompts.tune` lowers.

    Words and shares are drawn by (seed, step) alone.

    Args:
        fixed: embeddings [K + M, D] of classes and words with hand-written prompts.
    """
    classes = learner.known.count

    def terms(features: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        draws = generator(seed, "lapt", step)
        words = torch.randint(classes, len(fixed), labels.shape, generator=draws).to(labels.device)
        modal, between = torch.rand(2, generator=draws).tolist()
        texts = learner()
        return mixing_loss(
            features, labels, words, texts=texts, fixed=fixed.to(texts), scale=scale, shares=(modal, between)
        )

    return terms
