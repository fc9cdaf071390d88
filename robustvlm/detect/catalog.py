"""Every score by name: what it is called, where it comes from, what it needs, and how it is made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from robustvlm.core import registry
from robustvlm.core.registry import Table
from robustvlm.core.user_code import no_exit
from robustvlm.detect.base import Detector, FittedDetector, Head
from robustvlm.detect.distances import GDA, KNN, Mahalanobis, ViM
from robustvlm.detect.krnft import KRNFT
from robustvlm.detect.logits import ASH, GEN, MCM, MSP, DeltaEnergy, Energy, MaxLogit, ReAct
from robustvlm.detect.mixtures import ClassMixtures, COOkeD
from robustvlm.detect.sdm import SDM
from robustvlm.detect.words import SDIS, AdaNeg, NegLabel, mine_negatives, safe_rows
from robustvlm.errors import UserError, nearest

Need = Literal["encoder", "images", "words", "stream", "negatives"]

WHY_NOT: dict[Need, str] = {
    "encoder": "the model has no image and text encoder, only logits",
    "images": "it learns from images of known classes: pass --fit DATA",
    "words": "it needs words outside the known classes: pass --words FILE",
    "negatives": (
        "the model has learnt no negative prompts: make one that has, with `robustvlm tune-prompts --lapt`, and name "
        "its folder without a defence before it"
    ),
    "stream": "it remembers unlabelled images that came in before: pass --stream DATA",
}


@dataclass(frozen=True, eq=False)
class Supplies:
    """What scores can be made from.

    Args:
        head: the zero-shot head; of a model without an encoder, that of its logits (`Head.of_logits`).
        encoder: the features are those of an encoder with texts, and not logits in their place.
        features, labels: unit features [N, D] and labels [N] of images of known classes, None if there are none.
        words: unit text embeddings [W, D] of words outside the known classes, None if there are none.
        temperature: that energies divide the logits by; 1 is the model's own.
        stream: unit features [S, D] of unlabelled images, known and unknown, that came in before; None if none did.
        crops: unit features [S, C, D] of random crops of images of known classes, and the classes [S] of the images.
        negatives: unit embeddings [M, D] of words outside the classes that the model has learnt prompts for.
        texts: unit text embeddings [K, D] of the classes, where the head is not made of them but of prototypes of
            images; words are compared with these.
    """

    head: Head
    encoder: bool = True
    features: Tensor | None = field(default=None, repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    words: Tensor | None = field(default=None, repr=False)
    temperature: float = 1.0
    stream: Tensor | None = field(default=None, repr=False)
    crops: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    negatives: Tensor | None = field(default=None, repr=False)
    texts: Tensor | None = field(default=None, repr=False)

    @property
    def text_head(self) -> Head:
        """The head of the class texts."""
        return self.head if self.texts is None else Head(self.texts, self.head.logit_scale)

    @property
    def tempered(self) -> Head:
        """The head at the temperature of energies."""
        return replace(self.head, logit_scale=self.head.logit_scale / self.temperature)

    def has(self, need: Need) -> bool:
        """Whether a need can be met."""
        there = {
            "encoder": self.encoder,
            "images": self.features is not None,
            "words": self.words is not None,
            "stream": self.stream is not None,
            "negatives": self.negatives is not None,
        }
        return there[need]


@dataclass(frozen=True)
class Score:
    """A score of the catalogue; `needs` says what must be there for it besides logits.

    `source` is an arXiv number, or any other text that says where the score is from; `usual` scores are those that
    `all` stands for, which runs are known by.
    """

    name: str
    title: str
    source: str
    needs: tuple[Need, ...]
    make: Callable[[Supplies], Detector] = field(repr=False)
    usual: bool = True

    @property
    def where(self) -> str:
        """The source as tables show it."""
        return f"arXiv {self.source}" if self.source[:4].isdigit() else self.source

    def lacks(self, supplies: Supplies) -> str | None:
        """Say why the score cannot be made from these supplies; None if it can."""
        return next((WHY_NOT[need] for need in self.needs if not supplies.has(need)), None)

    def made(self, supplies: Supplies) -> Detector:
        """Return the score, fitted if it is one that learns.

        Raises UserError when something is missing, or there are too few images.
        """
        reason = self.lacks(supplies)
        if reason is not None:
            raise UserError(f"the score '{self.name}' cannot be used: {reason}")
        detector = self.make(supplies)
        taught = supplies.features is not None and self.name in SCORES  # your own has learnt in its trial
        if taught and isinstance(detector, FittedDetector):
            assert supplies.features is not None
            assert supplies.labels is not None
            if isinstance(detector, KRNFT) and supplies.crops is not None:
                return detector.fit_crops(*supplies.crops)
            return detector.fit_features(supplies.features, supplies.labels)
        return detector


def _neglabel(supplies: Supplies) -> NegLabel:
    words, head = _words(supplies), supplies.text_head
    return NegLabel(head, words[mine_negatives(words, head.class_embeddings.to(words))])


def _adaneg(supplies: Supplies) -> Detector:
    assert supplies.stream is not None, "asked for after the needs were checked"
    return AdaNeg(_neglabel(supplies)).remember(supplies.stream)


def _krnft(supplies: Supplies) -> Detector:
    texts = _neglabel(supplies)
    return KRNFT(replace(texts, n_groups=_groups(supplies, texts.negatives)))


def _lapt(supplies: Supplies) -> Detector:
    assert supplies.negatives is not None, "asked for after the needs were checked"
    return NegLabel(supplies.head, supplies.negatives, _groups(supplies, supplies.negatives))


def _groups(supplies: Supplies, negatives: Tensor) -> int:
    """Return how many groups of about as many negatives as there are classes there can be, ten at most."""
    return max(1, min(10, len(negatives) // len(supplies.head.class_embeddings)))


def _sdis(supplies: Supplies) -> Detector:
    words, classes = _words(supplies), supplies.text_head.class_embeddings
    rows = safe_rows(words, classes.to(words))
    if not len(rows):
        raise UserError("every word is nearer to a known class than these are to each other: pass others with --words")
    return SDIS(classes, words[rows])


def _words(supplies: Supplies) -> Tensor:
    assert supplies.words is not None, "asked for after the needs were checked"
    return supplies.words


SCORES: Table[Score] = Table(
    __package__,
    {
        score.name: score
        for score in (
            Score("msp", "MSP", "1610.02136", (), lambda s: MSP(s.head)),
            Score("mcm", "MCM", "2211.13445", ("encoder",), lambda s: MCM(s.head)),
            Score("max-logit", "MaxLogit", "1911.11132", (), lambda s: MaxLogit(s.head)),
            Score("energy", "Energy", "2010.03759", (), lambda s: Energy(s.head, s.temperature)),
            Score(
                "delta-energy",
                "ΔEnergy",
                "2510.11296",
                ("encoder",),
                lambda s: DeltaEnergy(s.head, temperature=s.temperature),
            ),
            Score(
                "delta-energy-mean",
                "ΔEnergy, mean",
                "2510.11296",
                ("encoder",),
                lambda s: DeltaEnergy(s.head, reset="mean", temperature=s.temperature),
            ),
            Score("ash", "ASH-S", "2209.09858", ("encoder",), lambda s: ASH(s.tempered)),
            Score("neglabel", "NegLabel", "2403.20078", ("encoder", "words"), _neglabel),
            Score("adaneg", "AdaNeg", "2410.20149", ("encoder", "words", "stream"), _adaneg, usual=False),
            Score("krnft", "KR-NFT", "2507.19847", ("encoder", "words", "images"), _krnft, usual=False),
            Score("lapt", "LAPT", "2407.08966", ("encoder", "negatives"), _lapt, usual=False),
            Score("s-dis", "S_DIS, text only", "2605.30745", ("encoder", "words"), _sdis),
            Score("react", "ReAct", "2111.12797", ("encoder", "images"), lambda s: ReAct(s.tempered)),
            Score("mahalanobis", "Mahalanobis", "1807.03888", ("encoder", "images"), lambda _: Mahalanobis()),
            Score("knn", "kNN", "2204.06507", ("encoder", "images"), lambda s: KNN(k=_neighbours(s))),
            Score("gda", "GDA", "2402.04087", ("encoder", "images"), lambda s: GDA(s.head)),
            Score("mixtures", "Class mixtures", "2408.15580", ("encoder", "images"), lambda _: ClassMixtures()),
            Score("vim", "ViM", "2203.10807", ("encoder", "images"), lambda s: ViM(s.tempered)),
            Score("cooked", "COOkeD", "2507.22576", ("encoder", "images"), lambda s: COOkeD(s.head)),
            Score("sdm", "SDM", "2509.12760", ("encoder", "images"), lambda s: SDM(s.head), usual=False),
            Score(
                "gen", "GEN", "Liu et al., CVPR 2023", (), lambda s: GEN(s.head, temperature=s.temperature), usual=False
            ),
        )
    },
)
"""Scores in the order of tables: first those that need nothing, then words, then images, then those of own files."""

BASELINES = ("msp", "mcm", "max-logit", "energy")
"""What other scores are compared with: they need nothing but the logits, and everybody has them."""


def _neighbours(supplies: Supplies) -> int:
    """Return 10, or half of the images that a class has on average: of other classes no neighbour is worth knowing."""
    if supplies.labels is None:
        return 1
    return max(1, min(10, len(supplies.labels) // (2 * len(supplies.labels.unique()))))


def parse_scores(text: str) -> tuple[str, ...]:
    """Return the names in a list such as `msp,knn,mine:score`, in the order of the catalogue, then your own ones.

    `all` stands for every usual score.

    Example:
        >>> parse_scores("knn, msp")
        ('msp', 'knn')
    """
    names = [part.strip() for part in text.split(",")]
    if "all" in names:
        names += [name for name in SCORES if SCORES[name].usual]
    for name in dict.fromkeys(names):
        if name != "all":
            find_score(name)
    return (*(name for name in SCORES if name in names), *dict.fromkeys(n for n in names if registry.names_own(n)))


def find_score(name: str) -> Score:
    """Return a score by its name, or the one that `module:callable` is or makes from `Supplies`.

    Raises:
        UserError: it is neither, or it cannot be had.
    """
    found = registry.load(name, SCORES, "score", also=("all",))
    if name in SCORES:
        return SCORES[name]
    if isinstance(found, Score):
        return replace(found, name=name, make=lambda supplies: own_detector(name, found.make, supplies))
    if not callable(found):
        registry.expect(name, found, Score, "a score", ("a function of Supplies that returns a Detector",))
    needs = tuple(getattr(found, "needs", ()))
    for need in needs:
        if need not in WHY_NOT:
            raise UserError(f"'{name}' needs '{need}': {nearest(str(need), WHY_NOT)}")
    title, source = str(getattr(found, "title", name)), str(getattr(found, "source", ""))
    return Score(name, title, source, needs, lambda supplies: own_detector(name, found, supplies))


def _expected(spec: str, made: object) -> Detector:
    detector: Detector = registry.expect(spec, made, Detector, "a detector", ("score",))
    return detector


def own_detector(spec: str, make: Callable[[Supplies], object], supplies: Supplies) -> Detector:
    """Return the detector of a user's function, after a trial on a few vectors; fitted where it learns from images.

    Raises:
        UserError: it fails, is no detector, or does not give one number for each row by that row alone.
    """
    made = _expected(spec, registry.call(spec, make, "a detector", supplies))
    if isinstance(made, FittedDetector) and supplies.features is not None and supplies.labels is not None:
        made = _expected(spec, registry.call(spec, made.fit_features, "it", supplies.features, supplies.labels))
    known = supplies.head.class_embeddings
    # Vectors between two classes, at all distances: their scores differ, as those of the class vectors may not.
    share = torch.linspace(0.1, 0.9, 6).to(known)[:, None]
    rows = torch.nn.functional.normalize(known[:1] * share + known[1:2] * (1 - share) ** 2, dim=1)
    with torch.no_grad(), no_exit(f"the score '{spec}'"):
        both = registry.call(spec, made.score, "scores", rows)
        one = registry.call(spec, made.score, "scores", rows[:1])
    if not isinstance(both, Tensor) or both.shape != rows.shape[:1] or not both.is_floating_point():
        got = f"{both.dtype} {list(both.shape)}" if isinstance(both, Tensor) else f"a {type(both).__name__}"
        raise UserError(f"'{spec}': score of features {list(rows.shape)} must return floats [{len(rows)}], got {got}")
    if both.isfinite().all() and not torch.allclose(both[:1], one, rtol=1e-3, atol=1e-5):
        raise UserError(f"'{spec}': the score of an image must depend on that image alone, not on others beside it")
    return made


@dataclass(frozen=True)
class Skipped:
    """A score that could not be used, and why."""

    name: str
    reason: str


def make_scores(names: Iterable[str], supplies: Supplies) -> tuple[dict[str, Detector], list[Skipped]]:
    """Return the named scores, ready to use, and those that cannot be used, with the reason.

    Example:
        >>> import torch
        >>> made, skipped = make_scores(["msp", "knn"], Supplies(Head(torch.eye(3), 10.0)))
        >>> list(made), skipped[0].name
        (['msp'], 'knn')
    """
    made: dict[str, Detector] = {}
    skipped: list[Skipped] = []
    for name in names:
        score = find_score(name)
        reason = score.lacks(supplies)
        try:
            if reason is None:
                made[name] = score.made(supplies)
        except UserError as error:  # too few images, or none that differ
            reason = str(error)
        if reason is not None:
            skipped.append(Skipped(name, reason))
    return made, skipped
