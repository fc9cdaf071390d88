"""Scores that compare an image with words outside the known classes, and where such words come from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core import LAMBDA_INF
from robustvlm.data.names import read_lines
from robustvlm.data.trees import Forest
from robustvlm.detect.base import Detector, Head
from robustvlm.errors import UserError
from robustvlm.text import name_key

# Words that name things outside the known classes: from a file, or from the bundled class trees

_TREES = ("cifar10", "cifar100", "emoji", "imagenet1k")

# A word nearer to a known class than this share of the classes are to their nearest other class may mean that class.
RISK_QUANTILE = 0.9


@cache
def tree_words() -> tuple[str, ...]:
    """Return every name in the bundled class trees, leaves and groups, each once, in a fixed order.

    Example:
        >>> len(tree_words()) > 1000, "mammal" in tree_words()
        (True, True)
    """
    found: dict[str, str] = {}
    for tree in _TREES:
        stack = [json.loads((files("robustvlm") / "assets" / "trees" / f"{tree}.json").read_text(encoding="utf-8"))]
        while stack:
            node = stack.pop()
            found.setdefault(name_key(node["name"]), node["name"])
            stack.extend(reversed(node.get("children", ())))
    return tuple(found.values())


def read_words(path: Path) -> tuple[str, ...]:
    """Return the words of a file, one a line or a JSON list.

    Raises UserError when it cannot be read or holds no word.
    """
    found = read_lines(path, "words")
    words = tuple(found.values()) if isinstance(found, dict) else tuple(found)
    words = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not words:
        raise UserError(f"the words file {path} holds no word: write one a line")
    return words


def outside(words: Iterable[str], class_names: Sequence[str], forest: Forest | None = None) -> tuple[str, ...]:
    """Return the words that are neither a class nor, in any tree, a group that holds one.

    Example:
        >>> outside(["wolf", "Dog", "animal"], ["dog"])
        ('wolf', 'animal')
    """
    taken = {name_key(name) for name in class_names}
    for tree in forest or ():
        taken |= {name_key(node) for path in tree.paths for node in path}
    return tuple(word for word in words if name_key(word) not in taken)


def safe_rows(words: Tensor, class_embeddings: Tensor) -> Tensor:
    """Return the rows [M] (int64) of the words that are not so near to a class that they may mean it.

    A word is left out when its largest cosine to a class passes the 90% quantile of the classes' cosines to their
    nearest other class: a beagle to a dog, as a rule (our reading of Immuno-VLM's upper bound, arXiv 2605.30745).

    Args:
        words: unit text embeddings [W, D]; class_embeddings: those of the known classes [K, D].

    Example:
        >>> classes = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), dim=1)
        >>> safe_rows(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]), classes)
        tensor([1])
    """
    between = class_embeddings @ class_embeddings.T
    nearest = between.fill_diagonal_(float("-inf")).amax(dim=1)
    risk = torch.quantile(nearest.double(), RISK_QUANTILE)
    return ((words @ class_embeddings.T).amax(dim=1) <= risk).nonzero().flatten()


# NegLabel: how much more an image looks like the known classes than like words far from all of them


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

    @property
    def texts(self) -> Tensor:
        """Embeddings [K + M, D] of the classes, then of the negative words."""
        return torch.cat([self.head.class_embeddings, self.negatives.to(self.head.class_embeddings)])

    def score(self, features: Tensor) -> Tensor:
        return mean_log_odds(self.ahead(features @ self.texts.to(features).T))

    def ahead(self, cosines: Tensor) -> Tensor:
        """Return the log-odds [groups, N] of the known classes' share in each group, from cosines [N, K + M]."""
        known, others = (self.head.logit_scale * cosines).tensor_split([len(self.head.class_embeddings)], dim=1)
        leading = known.logsumexp(dim=1)
        groups = [others[:, g :: self.n_groups].logsumexp(dim=1) for g in range(self.n_groups)]
        return torch.stack([leading - group for group in groups])


def mean_log_odds(ahead: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the log-odds [N] of the mean of probabilities given by their log-odds [G, N], weighted by `weights` [G].

    The logarithm is never left: shares near 1 would round to a tie.

    Example:
        >>> mean_log_odds(torch.tensor([[0.5], [0.75]]).logit()).sigmoid()
        tensor([0.6250])
    """
    extra = torch.zeros_like(ahead[:, :1]) if weights is None else weights.to(ahead).log()[:, None]
    return (F.logsigmoid(ahead) + extra).logsumexp(dim=0) - (F.logsigmoid(-ahead) + extra).logsumexp(dim=0)


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


# S_DIS: nearness to the best prototype, less nearness to the best antibody


@dataclass(frozen=True, eq=False)
class SDIS(Detector):
    """max_k <z, mu_k> - weight max_a <z, a> over prototypes mu [P, D] and antibodies a [A, D], all unit vectors.

    The features z are those behind the adapter, where there is one. A class may have several prototypes.

    Source: Immuno-VLM, arXiv 2605.30745, the inference score with lambda_inf = weight.

    Example:
        >>> import torch
        >>> SDIS(torch.eye(3)[:2], torch.eye(3)[2:]).score(torch.tensor([[0.0, 0.6, 0.8]]))
        tensor([0.2000])
    """

    prototypes: Tensor
    antibodies: Tensor
    weight: float = LAMBDA_INF

    def __post_init__(self) -> None:
        for name, vectors in (("prototypes", self.prototypes), ("antibodies", self.antibodies)):
            if vectors.ndim != 2 or not len(vectors):
                raise UserError(f"S_DIS needs {name} [at least 1, D], got {list(vectors.shape)}")
        if not self.weight >= 0:
            raise UserError(f"the weight of the antibodies must not be negative, got {self.weight}")

    def score(self, features: Tensor) -> Tensor:
        known = (features @ self.prototypes.to(features).T).amax(dim=1)
        return known - self.weight * (features @ self.antibodies.to(features).T).amax(dim=1)


@dataclass(frozen=True, eq=False)
class Hinge(SDIS):
    """max_k <z, mu_k> - weight max(0, max_a <z, a> - floor): the largest cosine, corrected near an antibody.

    Source: our reading, from measurements in which S_DIS lost to the largest cosine (docs/immunize.md).

    Example:
        >>> import torch
        >>> Hinge(torch.eye(3)[:2], torch.eye(3)[2:], 0.5, floor=0.6).score(torch.tensor([[0.0, 0.6, 0.8]]))
        tensor([0.5000])
    """

    floor: float = 0.0

    def score(self, features: Tensor) -> Tensor:
        known = (features @ self.prototypes.to(features).T).amax(dim=1)
        nearest = (features @ self.antibodies.to(features).T).amax(dim=1)
        return known - self.weight * (nearest - self.floor).clamp_min(0.0)
