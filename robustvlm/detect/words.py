"""Scores that compare an image with words outside the known classes, and where such words come from."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core import LAMBDA_INF
from robustvlm.data.names import read_lines, readings, same_things
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
    for path in _paths():
        found.setdefault(name_key(path[-1]), path[-1])
    return tuple(found.values())


@cache
def _paths() -> tuple[tuple[str, ...], ...]:
    """Return the way from the root to every node of the bundled trees, in their order."""
    found = []
    for tree in _TREES:
        root = json.loads((files("robustvlm") / "assets" / "trees" / f"{tree}.json").read_text(encoding="utf-8"))
        stack: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), root)]
        while stack:
            above, node = stack.pop()
            found.append((*above, node["name"]))
            stack.extend((found[-1], child) for child in reversed(node.get("children", ())))
    return tuple(found)


def groups_of(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the groups of the bundled trees that hold something of a given name, or a kind of it by its last word.

    Example:
        >>> {"mammal", "canine"} <= set(groups_of(["Dogs"])), "edible fruit" in groups_of(["Dogs"])
        (True, False)
    """
    known = {words for name in class_names for words in readings(name)}

    def held(name: str) -> bool:
        return any(words[start:] in known for words in readings(name) for start in range(len(words)))

    return tuple(dict.fromkeys(group for path in _paths() if held(path[-1]) for group in path[:-1]))


def words_outside(class_names: Sequence[str], forest: Forest | None, path: Path | None = None) -> tuple[str, ...]:
    """Return the words of a file, or the names in the bundled trees, that are no class and no group that holds one.

    Which groups do is said by the trees of the data; of the bundled names by the bundled trees, where the data have
    none.

    Raises UserError when the file cannot be read or holds no word.
    """
    if path is not None:
        return outside(read_words(path), class_names, forest)
    above = groups_of(class_names) if forest is None else ()
    return outside(tree_words(), [*class_names, *above], forest)


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
    """Return the words that say nothing that a class says too, and are no group that holds one in any tree.

    Example:
        >>> outside(["wolf", "Dogs", "animal"], ["dog"])
        ('wolf', 'animal')
    """
    words = tuple(words)
    said, taken = same_things(words, class_names), {name_key(name) for name in class_names}
    for tree in forest or ():
        taken |= {name_key(node) for path in tree.paths for node in path}
    return tuple(word for word in words if word not in said and name_key(word) not in taken)


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


# AdaNeg: negatives gathered from the images that come in, and held still while an image is judged


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
