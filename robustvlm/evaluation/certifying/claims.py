"""From the settings of a run to its claim: what is stated, how it is bounded, and what it can give at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from robustvlm.certify import (
    Certifier,
    ClassAtRadius,
    ClassRadius,
    FeatureRadius,
    FeatureTest,
    OpensetRadius,
    OpensetRule,
    RuleRadius,
    VocabularyRadius,
    VoteAtRadius,
    VoteRadius,
    best_class_radius,
    best_mean,
    best_tangent_radius,
    best_vote_radius,
    best_vote_test_radius,
    feature_radius,
    format_exact,
    format_up,
    samples_needed,
)
from robustvlm.certify.normal import Array
from robustvlm.certify.record import Source, StopRule
from robustvlm.errors import UserError
from robustvlm.runs.certify_config import CertifyConfig

_PILOT = 200

RULES = {
    "feature": "the mean feature m over the noise, of infinitely many copies",
    "class": "the class whose text is nearest to the mean feature m over the noise, of infinitely many copies",
    "vote": "the class that most of infinitely many noisy copies are put into (hard vote), another rule than the class "
    "of the mean feature",
    "openset": "accepted or rejected by the score of the mean feature m over the noise, of infinitely many copies",
}
"""The deployed rule that a claim is about: an ideal one, of which finitely many copies keep less (T10)."""

_DEPLOYED = {
    "feature": "the mean of {n0:,} fresh copies keeps this cosine to m(x)",
    "class": "the class nearest to the mean of {n0:,} fresh copies is the certified one",
    "vote": "the class with most of {n0:,} fresh votes is the certified one",
}


def deployed_rule(config: CertifyConfig) -> str:
    """Say what the deployed columns state, of how many copies, or why there are none; "" where none are asked for."""
    if config.deployed is None:
        return ""
    n0 = f"{config.deployed:,}"
    if config.claim == "openset" or config.prompts == "adaptive" or (config.radius and config.claim != "feature"):
        return (
            f"of the model as it is deployed, with {n0} copies, this run states nothing"
            + ("" if config.claim == "openset" else ": leave out --radius" if config.radius else "")
            + "; the abstaining prediction from fresh copies keeps the certificate (docs/certify.md)"
        )
    what = _DEPLOYED[config.claim].format(n0=config.deployed)
    return (
        f"within the radius in the column deployed_radius, {what} with probability 1 - {format_exact(config.alpha)} "
        "over their noise, at any image chosen without knowing it; 0: nothing is certified of it"
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One claim, ready to be decided for any number of images.

    Args:
        statement: what a certificate says, in words. rule: whose answer that is, in words (`RULES`).
        theorem, bound, stop_rule, alpha_split, label_source, direction_source: as in the record of a certificate.
        best: radius that so many samples per image give at best.
        certifier: makes the certifier of one image.
    """

    statement: str
    rule: str
    theorem: str
    bound: str
    stop_rule: StopRule
    alpha_split: dict[str, float]
    best: Callable[[int], float]
    certifier: Callable[[], Certifier]
    label_source: Source = "none"
    direction_source: Source = "none"


def pilot_size(claim: str, samples: int, *, early: bool) -> int:
    """Return how many of the samples make choices: a tenth, at least 200, at most half; none where none is needed.

    Example:
        >>> [pilot_size("class", n, early=False) for n in (200, 1000, 10_000)], pilot_size("feature", 1000, early=True)
        ([100, 200, 1000], 0)
    """
    if early:
        return 0 if claim == "feature" else min(_PILOT, samples // 2)
    return max(min(_PILOT, samples // 2), samples // 10)


def make_plan(
    config: CertifyConfig,
    *,
    text: Array | None = None,
    vectors: Array | None = None,
    rule: OpensetRule | None = None,
    rounding: float = 0.0,
    baselines: bool = True,
) -> Plan:
    """Return the plan of a run's claim.

    Args:
        text: class embeddings [K, D], for class and vote claims. vectors: [K, A, D], for open-set claims of one
            threshold; rule: for those of a model with thresholds of its own.
        rounding: bound of the rounding of kept features (class claims only).
        baselines: fill the columns of other bounds (feature claims; they need the clean feature).
    """
    if config.claim == "feature":
        return _feature(config, baselines)
    if rule is not None:
        return _rule(config, rule)
    if config.claim == "openset":
        assert vectors is not None
        return _openset(config, vectors)
    assert text is not None
    return _vote(config, text) if config.claim == "vote" else _class(config, text, rounding)


def require_possible(plan: Plan, config: CertifyConfig) -> float:
    """Return the largest radius that the settings can give; refuse settings under which every image must abstain."""
    best = plan.best(config.samples)
    wanted = config.radius if config.radius is not None else 0.0
    if best > 0.0 and best >= wanted:
        return best
    needed = samples_needed(plan.best, wanted if wanted else 1e-9)
    goal = f"a radius of {format_exact(wanted)}" if wanted else "any radius"
    cure = (
        f"pass --samples {needed} or more (without any spread in the samples; real images need more), a larger sigma "
        "or a larger alpha"
        if needed is not None
        else "no number of samples does it: pass a smaller radius or a larger sigma"
    )
    have = f"{config.samples} samples at sigma {format_exact(config.sigma)} and alpha {format_exact(config.alpha)}"
    most = format_up(best, 4)
    raise UserError(f"{have} can certify {goal} for no image, whatever the model (at best {most}): {cure}")


def _feature(config: CertifyConfig, baselines: bool) -> Plan:
    assert config.min_cos is not None
    common: dict[str, Any] = {"cos0": config.min_cos, "sigma": config.sigma, "alpha": config.alpha}
    certifier: Callable[[], Certifier]
    if config.radius is None:
        certifier = partial(FeatureRadius, **common, n=config.samples, n_pilot=config.n_pilot, baselines=baselines)
    else:
        certifier = partial(FeatureTest, **common, n=config.samples, radius=config.radius)
    cos0 = config.min_cos
    return Plan(
        statement="the smoothed features of image and attacked image have a cosine of at least " + format_exact(cos0),
        rule=RULES["feature"],
        theorem="T4",
        bound="betting",
        stop_rule="fixed" if config.radius is None else "anytime",
        alpha_split={"norm of the smoothed feature (betting)": config.alpha},
        # The first sample only sets the direction.
        best=lambda n: feature_radius(max(0.0, 2.0 * best_mean(max(1, n - 1), config.alpha) - 1.0), cos0, config.sigma),
        certifier=certifier,
        direction_source="predictable",
    )


def _class(config: CertifyConfig, text: Array, rounding: float) -> Plan:
    alpha, sigma = config.alpha, config.sigma
    common = _common(config, text)
    statement = "the mean feature of the noisy copies keeps its class"
    if config.prompts == "adaptive":
        return Plan(
            statement=f"{statement}, for prompts chosen at any time",
            rule=RULES["class"],
            theorem="T7",
            bound="mcdiarmid+kl",
            stop_rule="fixed",
            alpha_split={"ball around the mean": 0.5 * alpha, "covariance": 0.5 * alpha},
            best=lambda n: best_class_radius(n - _fixed_pilot(config, n), alpha, sigma),
            certifier=partial(VocabularyRadius, **common, rounding=rounding),
            label_source="pilot",
        )
    early = config.radius is not None
    certifier: Callable[[], Certifier]
    if early:
        certifier = partial(ClassAtRadius, **common, radius=config.radius or 0.0)
    else:
        certifier = partial(ClassRadius, **common, rounding=rounding, deployed=config.deployed)
    tool = "anytime test" if early else "ELL band"
    return Plan(
        statement=statement,
        rule=RULES["class"],
        theorem="T6" if early else "T5",
        bound="tangent" if early else "ell",
        stop_rule="anytime" if early else "fixed",
        alpha_split={f"margin to each rival ({tool}; no correction for their number, T8)": alpha},
        best=_linear_best(config, 0.5),
        certifier=certifier,
        label_source="pilot",
    )


def _vote(config: CertifyConfig, text: Array) -> Plan:
    alpha, sigma = config.alpha, config.sigma
    common = _common(config, text)
    early = config.radius is not None
    certifier: Callable[[], Certifier]
    if early:
        certifier = partial(VoteAtRadius, **common, radius=config.radius or 0.0)
    else:
        certifier = partial(VoteRadius, **common, deployed=config.deployed)

    def best(n: int) -> float:
        rest = n - _fixed_pilot(config, n)
        return best_vote_test_radius(rest, alpha, sigma) if early else best_vote_radius(rest, alpha, sigma)

    return Plan(
        statement="the class that most noisy copies are put into stays the same (hard vote)",
        rule=RULES["vote"],
        theorem="T0",
        bound="betting" if early else "clopper-pearson",
        stop_rule="anytime" if early else "fixed",
        alpha_split={f"share of votes ({'betting' if early else 'Clopper-Pearson'})": alpha},
        best=best,
        certifier=certifier,
        label_source="pilot",
    )


def _openset(config: CertifyConfig, vectors: Array) -> Plan:
    assert config.tau is not None
    early = config.radius is not None
    length = float(np.linalg.norm(vectors, axis=-1).max())
    # Whichever side is the easier one: the least mean score that accepting or rejecting asks for.
    target = 0.5 * (1.0 - abs(config.tau) / max(length, 1e-12))
    return Plan(
        statement=f"the open-set score of the mean feature stays on its side of {format_exact(config.tau)}",
        rule=RULES["openset"],
        theorem="T6" if early else "T5",
        bound="tangent" if early else "ell",
        stop_rule="anytime" if early else "fixed",
        alpha_split={"score on the side that the pilot chose (no correction, T8)": config.alpha},
        best=_linear_best(config, min(max(target, 1e-6), 0.5)),
        certifier=partial(
            OpensetRadius,
            vectors=vectors,
            tau=config.tau,
            sigma=config.sigma,
            alpha=config.alpha,
            n=config.samples,
            n_pilot=config.n_pilot,
            radius=config.radius,
        ),
        label_source="pilot",
    )


def _rule(config: CertifyConfig, rule: OpensetRule) -> Plan:
    early = config.radius is not None
    # Whichever decision is the easiest one, as for a single threshold.
    target = 0.5 * (1.0 - float(np.abs(rule.thresholds).max()) / max(rule.reach, 1e-12))
    low, high = float(rule.thresholds.min()), float(rule.thresholds.max())
    between = format_exact(low) if low == high else f"{format_exact(low)} to {format_exact(high)}, by class"
    statement = f"the image stays accepted, or stays rejected (thresholds of the model: {between})"
    if config.tau is not None:
        statement = (
            "the score of the mean feature, not scaled to unit length, stays above or stays below "
            f"{format_exact(config.tau)} "
            "(--tau in place of the model's thresholds: not the decision of the deployed model)"
        )
    return Plan(
        statement=statement,
        rule=RULES["openset"],
        theorem="T6" if early else "T5",
        bound="tangent" if early else "ell",
        stop_rule="anytime" if early else "fixed",
        alpha_split={"claims that keep the decision, chosen by the pilot (no correction, T8)": config.alpha},
        best=_linear_best(config, min(max(target, 1e-6), 0.5)),
        certifier=partial(
            RuleRadius,
            rule=rule,
            sigma=config.sigma,
            alpha=config.alpha,
            n=config.samples,
            n_pilot=config.n_pilot,
            radius=config.radius,
        ),
        label_source="pilot",
    )


def _linear_best(config: CertifyConfig, target: float) -> Callable[[int], float]:
    def best(n: int) -> float:
        rest = n - _fixed_pilot(config, n)
        if rest < 1:
            return 0.0
        if config.radius is None:
            return best_class_radius(rest, config.alpha, config.sigma, target=target)
        return best_tangent_radius(rest, config.alpha, config.sigma, target=target)

    return best


def _fixed_pilot(config: CertifyConfig, n: int) -> int:
    return pilot_size(config.claim, n, early=config.radius is not None)


def _common(config: CertifyConfig, text: Array) -> dict[str, Any]:
    return {
        "text": text,
        "sigma": config.sigma,
        "alpha": config.alpha,
        "n": config.samples,
        "n_pilot": config.n_pilot,
    }
