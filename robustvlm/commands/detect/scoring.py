"""The scores of a detect run: which are asked for and attacked, what they are made from, and what every image gets."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from robustvlm.attacks import DEFAULT_EPS, LaneAttack, ThreatModel, parse_attacks, parse_eps, parse_norm
from robustvlm.commands.common.inputs import name_and_spec
from robustvlm.commands.detect import DetectSettings
from robustvlm.commands.detect.encoding import Encoded
from robustvlm.commands.detect.summary import KNOWN, OWN, OWN_SDIS, PROMISED, NamedData, UnderAttack
from robustvlm.core import LAMBDA_INF
from robustvlm.core.registry import names_own
from robustvlm.data.names import same_things
from robustvlm.data.specs import Unlabelled, parse_spec
from robustvlm.data.splits import _ROWS, copies, in_both
from robustvlm.defenses import Classifier
from robustvlm.detect import SCORES, SDIS, Detector, Head, Hinge, Supplies, head_of, make_scores, parse_scores
from robustvlm.detect.base import prototypes_of, require_temperature
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.text import without_secrets

# What the options of a run name, read with the libraries that know it: scores, unknown sets and attacks

_TAKEN = (KNOWN, "fit", "stream", "adversarial", PROMISED)
# Attacked unless the user says which: one that everybody has, the usual CLIP score, and one of the images' cloud.
_ATTACKED = ("mcm", "energy", "mahalanobis")


def check(settings: DetectSettings) -> None:
    """Raise a UserError for a setting that makes no sense, before data or model are opened."""
    scores_of(settings)
    require_temperature(settings.temperature)
    if settings.under_attack:
        attacks_of(settings)
        threat_of(settings)
        attacked_scores(settings, may_refuse=True)
    unknown_sets(settings)


def scores_of(settings: DetectSettings) -> tuple[str, ...]:
    """Return the scores of the catalogue that are asked for; those of the model are shown wherever it has any.

    Example:
        >>> scores_of(DetectSettings(scores="mcm,own,energy"))
        ('mcm', 'energy')
    """
    rest = [name for name in _listed(settings.scores) if name not in (OWN, OWN_SDIS)]
    return parse_scores(",".join(rest)) if rest else ()


def asks_own(settings: DetectSettings) -> bool:
    """Whether a score of the model itself is asked for by name."""
    return any(name in (OWN, OWN_SDIS) for name in _listed(settings.scores))


def unknown_sets(settings: DetectSettings) -> list[NamedData]:
    """Return the sets of unknown images with distinct names: as given, `NAME=SPEC`, or made from the spec.

    Example:
        >>> [named.name for named in unknown_sets(DetectSettings())]
        ['near', 'far']
    """
    found: list[NamedData] = []
    for text in settings.unknown:
        given, spec = name_and_spec(text)
        name = given or _short_name(spec)
        parse_spec(spec)
        if name in _TAKEN:
            other = setting("ood", f"other={spec}")
            raise UserError(f"a set of unknown images cannot be called '{name}': name it, as {other}")
        if name in [known.name for known in found]:
            other = setting("ood", f"NAME={spec}")
            raise UserError(f"two sets of unknown images are called '{name}': name them, as {other}")
        found.append(NamedData(name=name, spec=spec))
    return found


def attacks_of(settings: DetectSettings) -> list[LaneAttack]:
    """Return the attacks under which scores are judged; none without `under_attack`."""
    found = []
    for attack in parse_attacks(settings.attack) if settings.under_attack else ():
        if not isinstance(attack, LaneAttack):
            raise UserError(f"scores are attacked by our own attacks only, got '{attack.name}': pass for example pgd")
        found.append(attack)
    return found


def threat_of(settings: DetectSettings) -> tuple[ThreatModel, str]:
    """Return the ball of the attacks, and its radius as it was written."""
    norm = parse_norm(settings.norm)
    radii = parse_eps(str(settings.eps) if settings.eps is not None else DEFAULT_EPS[norm])
    if len(radii) != 1:
        raise BadSetting("eps", "takes one radius here", got=f"'{settings.eps}'")
    return ThreatModel(norm, radii[0][1]), radii[0][0]


def attacked_scores(settings: DetectSettings, *, may_refuse: bool) -> list[str]:
    """Return the scores to attack; a model that may refuse has its own score attacked first.

    Example:
        >>> attacked_scores(DetectSettings(scores="msp,mcm", under_attack=True), may_refuse=True)
        ['own', 'mcm']
    """
    catalogue = scores_of(settings)
    if settings.attack_scores is None:
        return [OWN] * may_refuse + [name for name in _ATTACKED if name in catalogue]
    wanted = _listed(settings.attack_scores)
    for name in wanted:
        if name not in (*SCORES, *catalogue, OWN, OWN_SDIS) and not names_own(name):
            where = setting("attack_scores")
            raise UserError(f"unknown score '{name}' in {where}: {nearest(name, [*SCORES, OWN])}")
        if name not in (*catalogue, OWN, OWN_SDIS):
            raise UserError(f"the score '{name}' is to be attacked and not in {setting('scores')}: add it there")
        if name == OWN and not may_refuse:
            raise UserError("the model never refuses, so it has no acceptance of its own to attack: leave out own")
    return list(dict.fromkeys(wanted))


def under_attack_of(settings: DetectSettings, *, may_refuse: bool) -> UnderAttack | None:
    """Return what the manifest says of the attacks; None without them."""
    if not settings.under_attack:
        return None
    threat, text = threat_of(settings)
    return UnderAttack(
        scores=attacked_scores(settings, may_refuse=may_refuse),
        attack=[attack.name for attack in attacks_of(settings)],
        norm=threat.norm,
        eps=threat.eps,
        eps_text=text,
        limit=settings.attack_limit,
        lanes=settings.lanes,
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _short_name(spec: str) -> str:
    """Return a name for a data spec: its split, or the last word of what it names; nothing of an address's query."""
    parsed = parse_spec(spec)
    split = parsed.options.get("split")
    if split:
        return split
    words = re.findall(r"[A-Za-z0-9][\w-]*", _place(parsed.rest)) or [parsed.kind]
    stem = [word for word in words if word not in ("parquet", "tar", "json")] or words
    return stem[-1][:40]


def _place(rest: str) -> str:
    """Return a path or address without its user, password and query, which may be secret."""
    return without_secrets(rest).partition("?")[0] if "://" in rest else rest


# From features to scores: what they are made from, the scores of every image, and the time that takes


@dataclass(frozen=True, eq=False)
class Panel:
    """The scores of a run, ready to use.

    Args:
        head: the zero-shot head; encoder: whether features are those of an encoder, and not logits.
        detectors: by name; skipped: scores that cannot be used, with the reason.
        may_refuse: the model has an acceptance score of its own.
    """

    head: Head
    encoder: bool
    detectors: dict[str, Detector]
    skipped: dict[str, str]
    may_refuse: bool
    microseconds: dict[str, float] = field(default_factory=dict)

    def inputs(self, found: Encoded) -> Tensor:
        """Return what detectors take: features, or logits in their place."""
        if self.encoder and found.features is not None:
            return found.features
        assert found.output is not None, "a model without an encoder gives logits"
        return found.output[:, : len(self.head.class_embeddings)]

    def predictions(self, found: Encoded) -> Tensor:
        """Return the class with the largest logit of every image [N], whether refused or not."""
        if found.output is not None:
            return found.output[:, : len(self.head.class_embeddings)].argmax(dim=1)
        return self.head.logits(self.inputs(found)).argmax(dim=1)

    def scores(self, found: Encoded) -> dict[str, Tensor]:
        """Return every score of every image, float64 [N] by name; the model's own acceptance first."""
        values: dict[str, Tensor] = {}
        if self.may_refuse and found.output is not None:
            values[OWN] = found.output[:, -1].double()
        inputs = self.inputs(found)
        for name, detector in self.detectors.items():
            began = time.perf_counter()
            values[name] = score_all(detector, inputs)
            self.microseconds[name] = 1e6 * (time.perf_counter() - began) / max(1, len(inputs))
        return values


def score_all(detector: Detector, inputs: Tensor) -> Tensor:
    """Return the scores of all rows [N, D] as float64 [N], some rows at a time."""
    with torch.no_grad():
        return torch.cat([detector.score(part).double() for part in inputs.split(_ROWS)])


def make_panel(
    classifier: Classifier,
    templates: Sequence[str],
    names: Sequence[str],
    fit: Encoded | None,
    words: Tensor | None,
    *,
    stream: Encoded | None = None,
    crops: tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | None = None,
    temperature: float = 1.0,
) -> Panel:
    """Return the named scores for a model, fitted to `fit`; `words` are unit text embeddings [W, D].

    Energies divide the logits by `temperature`; scores that gather negatives have seen the `stream`, and KR-NFT learns
    from `crops` [N, C, D] of some images, with their labels; `negatives` are the model's own negative prompts [M, D].

    Raises UserError when none of them can be used.
    """
    head, encoder = head_and_kind(classifier, templates)
    features = None if fit is None or not encoder else fit.features
    labels = None if fit is None else fit.labels
    came = None if stream is None or not encoder else stream.features
    words, negatives = (words, negatives) if encoder else (None, None)
    texts = None
    if words is not None and prototypes_of(classifier) is not None:
        texts = _texts(classifier, templates)  # prototypes of images are no match for words
    supplies = Supplies(head, encoder, features, labels, words, temperature, came, crops, negatives, texts)
    detectors, skipped = make_scores(names, supplies)
    reasons = {item.name: item.reason for item in skipped}
    own = own_sdis(classifier)
    if own is not None:
        detectors = {OWN_SDIS: own, **detectors}
    if not detectors and not classifier.can_reject:
        name, reason = next(iter(reasons.items()))
        raise UserError(f"none of the scores can be used; the first, '{name}': {reason}")
    return Panel(head, encoder, detectors, reasons, classifier.can_reject)


@dataclass(frozen=True, eq=False)
class LearntWords:
    """Words outside the classes that a model has learnt prompts for.

    Args:
        words: those that are used; embeddings: unit embeddings [M, D] of these, None where there are none.
        naming: words that name a class of an unknown set, with the set's name: left out, unless oracles are asked for.
    """

    words: tuple[str, ...] = ()
    embeddings: Tensor | None = None
    naming: Mapping[str, str] = field(default_factory=dict)


def negative_prompts(classifier: Classifier, unknown: Sequence[tuple[str, Unlabelled]], *, oracle: bool) -> LearntWords:
    """Return the negative prompts of a model, as NegLabel's words are: without those that name what is judged.

    Raises UserError when none is left.
    """
    found, words = getattr(classifier, "negative_embeddings", None), tuple(getattr(classifier, "negative_words", ()))
    if not isinstance(found, Tensor):
        return LearntWords()
    naming = {word: name for name, source in reversed(unknown) for word in same_things(words, source.things())}
    rows = [row for row, word in enumerate(words) if oracle or word not in naming]
    if not rows:
        raise UserError(
            "every negative prompt of the model names a class of the unknown sets, so that LAPT would be told what it "
            f"is tested on: tune prompts of other words, or pass {setting('oracle_words')}"
        )
    return LearntWords(tuple(words[row] for row in rows), found.detach().float().cpu()[rows], naming)


def own_sdis(classifier: Classifier) -> Detector | None:
    """Return the score of an immunised model, before thresholds of classes come off; None of others.

    It keeps prototypes [K, M, D] and antibodies [A, D] with their weight; with a floor the score is a hinge, not S_DIS.
    """
    prototypes, antibodies = getattr(classifier, "prototypes", None), getattr(classifier, "antibodies", None)
    if not isinstance(prototypes, Tensor) or not isinstance(antibodies, Tensor) or not len(antibodies):
        return None
    flat, others = prototypes.detach().float().cpu().flatten(0, -2), antibodies.detach().float().cpu()
    weight, floor = float(getattr(classifier, "weight", LAMBDA_INF)), getattr(classifier, "floor", None)
    return SDIS(flat, others, weight) if floor is None else Hinge(flat, others, weight, floor)


def head_and_kind(classifier: Classifier, templates: Sequence[str]) -> tuple[Head, bool]:
    """Return the head that scores use, which is the model's own, and whether the model has an encoder for it."""
    vlm = classifier.vlm
    if vlm is None:
        return Head.of_logits(len(classifier.class_names)), False
    vectors = classifier.class_embeddings
    if vectors is None or vectors.ndim != 2 or len(vectors) != len(classifier.class_names):
        return Head(_texts(classifier, templates), vlm.logit_scale), True
    head = head_of(classifier)
    parts = {each.name: getattr(head, each.name) for each in fields(head)}
    found = {name: part.detach().float().cpu() for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(head, logit_scale=vlm.logit_scale, **found), True


def _texts(classifier: Classifier, templates: Sequence[str]) -> Tensor:
    assert classifier.vlm is not None, "asked for where there is an encoder"
    return class_embeddings(classifier.vlm, classifier.class_names, templates).detach().float().cpu()


def require_apart(known: Encoded, fit: Encoded | None, known_spec: str, fit_spec: str | None) -> None:
    """Refuse to judge scores on images that they have learnt from: they would know them by heart."""
    both = [] if fit is None or fit_spec is None else in_both(known_spec, known.ids, fit_spec, fit.ids)
    if both:
        raise UserError(
            f"{len(both)} images are both in {setting('fit')} and in {setting('id')} (the first, '{both[0]}'): judge "
            "scores on images that they have not learnt from"
        )


def require_before(stream: Encoded, spec: str, judged: Mapping[str, tuple[Encoded, str]]) -> None:
    """Refuse a stream that holds images which are judged: it came in before them."""
    for name, (found, other) in judged.items():
        both = in_both(other, found.ids, spec, stream.ids)
        if both:
            raise UserError(
                f"{len(both)} images of {setting('stream')} are judged in '{name}' (the first, '{both[0]}'): pass "
                "other images, those that came in before"
            )


def copies_of(found: Encoded, fit: Encoded | None) -> int:
    """Return how many images have the feature of one that was learnt from, to three decimals: copies, as a rule."""
    if fit is None or fit.features is None or found.features is None:
        return 0
    return copies(found.features, fit.features)


def of_known_classes(found: Encoded) -> tuple[Encoded, int]:
    """Return the images that have a known class, and how many have none."""
    rows = (found.labels >= 0).nonzero().flatten()
    return found.rows(rows), len(found.ids) - len(rows)


def mean_time(sets: Mapping[str, Encoded]) -> float:
    """Return milliseconds per image of the encoder, over all sets."""
    images = sum(len(part.ids) for part in sets.values())
    return 1000 * sum(part.seconds for part in sets.values()) / max(1, images)
