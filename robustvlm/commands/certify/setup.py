"""From options to a claim that is ready to be decided: settings checked and settled, classes and rule at hand."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from robustvlm.attacks import PRECISIONS
from robustvlm.certify import settings_digest
from robustvlm.certify.claims import (
    DEFAULT,
    DEFAULT_KEPT,
    Claim,
    Materials,
    Plan,
    find_claim,
    is_own,
    make_plan,
    own_digest,
)
from robustvlm.certify.claims.changed_words import words_plan
from robustvlm.certify.claims.class_ import CLASS
from robustvlm.certify.claims.local_noise import local_plan
from robustvlm.certify.claims.openset import OPENSET
from robustvlm.certify.claims.recall import RECALL
from robustvlm.certify.claims.rotation import MOST as MOST_ANGLE
from robustvlm.certify.claims.rotation import rotation_plan
from robustvlm.certify.claims.vote import NAMED, OPEN_VOTE, VOTE
from robustvlm.certify.claims.wordings import worded_plan
from robustvlm.certify.local_noise import LocalNoise, read_local_noise
from robustvlm.certify.normal import check_alpha
from robustvlm.certify.threats import PLAIN, Noise, Rotation, Threat, find_threat, read_noise
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.certify.config import ASIDE, CertifyConfig, noise_settings
from robustvlm.commands.certify.gallery import Gallery
from robustvlm.commands.certify.materials import antibodies_of, own_vectors, rule_of
from robustvlm.commands.certify.wordings import paraphrases_in
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import sides
from robustvlm.defenses import SmoothedVLM
from robustvlm.defenses.answering import answers_of, speaker_of
from robustvlm.defenses.load import declared_rule
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.smoothing import FORM, Rule
from robustvlm.defenses.specs import split_spec
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.models import VLM
from robustvlm.text import format_exact

DEFAULT_ALPHA, MAX_ALPHA = 0.001, 0.5
_AT_SIGMAS = (0.25, 0.5, 1.0, 1.5, 2.0)
_AT_DEGREES = (0.5, 1.0, 2.0, 5.0, 10.0)

OWN_CLAIM = (
    "The claim '{spec}' is code beside this program: that it is true with the probability stated is for its author to "
    "prove"
)

# The numbers and words of a command, checked before anything is loaded


def claim_of(settings: CertifySettings) -> str:
    """Return the name of the claim that the settings mean."""
    if settings.claim is not None:
        return settings.claim
    rule = declared_rule(settings.model)
    if rule is not None:  # what is deployed is what is certified
        return _claim_of_rule(settings.model, rule).name
    return DEFAULT if settings.from_cache is None else DEFAULT_KEPT


def _claim_of_rule(model: str, rule: Rule) -> Claim:
    """Return the claim about the rule by which a model answers from its copies.

    Raises:
        UserError: an immunised head by the mean, which no command answers by.
    """
    made = saved_model(split_spec(model)[0])
    if made is None or not made.refuses:
        return VOTE if rule.votes else CLASS
    if not rule.votes:
        raise UserError(
            f"'{model}': the copies of an immunised head answer by vote: write +smooth:SIGMA:N0:{rule}:vote"
        )
    return OPEN_VOTE


def check(settings: CertifySettings) -> None:
    """Refuse settings that make no sense on their own, or with the head of a model that has one.

    Raises:
        UserError: what is wrong with them.
    """
    made, claim = saved_model(split_spec(settings.model)[0]), find_claim(claim_of(settings))
    if settings.alpha is not None and check_alpha(settings.alpha) > MAX_ALPHA:
        raise BadSetting(
            "alpha", f"is an error probability, at most {MAX_ALPHA:g}", got=f"{settings.alpha}: pass 0.001"
        )
    threat = settle_noise(settings).threat
    if not threat.gaussian and claim not in (VOTE, NAMED, OPEN_VOTE):
        raise UserError(
            f"the threat '{threat.name}' is certified by shares of votes alone: pass {setting('claim', VOTE.name)}"
        )
    if made is not None and made.refuses and claim.head == "rule" and not threat.of_pixels:
        raise UserError(
            f"'{settings.model}' has no thresholds for the noise against {threat.name}: pass {setting('tau')} and the "
            f"encoder below, or {setting('claim', VOTE.name)}"
        )
    if isinstance(threat, Rotation):
        _require_rotation(claim, settings)
    _require_fixed_or_chosen(claim, settings)
    _require_words(claim, settings)
    _positive("radius", settings.radius)
    if settings.precision not in PRECISIONS:
        raise UserError(f"unknown precision '{settings.precision}': {nearest(settings.precision, PRECISIONS)}")
    _require_own_rule(claim, settings)
    if settings.gallery is not None and claim is not RECALL:
        raise UserError(f"{setting('gallery')} is for {setting('claim', RECALL.name)}")
    claim.check(settings, refuses=made is not None and made.refuses)
    unread = tuple(name for name in ("min_cos", "top", "weight") if name not in claim.options)
    settings.require_usual(unread, f"is not read by the claim '{claim.name}': leave it out")
    if settings.cache not in (None, "float16", "float32"):
        raise BadSetting("cache", "keeps float16 or float32", got=f"'{settings.cache}'")
    if settings.cache is not None and claim.head == "votes":
        raise UserError(
            f"votes of copies cannot be kept for other prompts: leave out {setting('cache')}, which is for features "
            f"({setting('claim', DEFAULT)})"
        )
    if settings.cache is not None and settings.radius is not None:
        raise UserError(
            f"{setting('cache')} keeps a number of samples that was fixed beforehand: leave out {setting('radius')}"
        )


def _require_rotation(claim: Claim, settings: CertifySettings) -> None:
    """Refuse what is not certified of rotated images."""
    if claim is not VOTE:
        raise UserError(
            f"every angle of a range is certified of the class by vote: pass {setting('claim', VOTE.name)}, and of a "
            "model that abstains one that votes, as +smooth:0.25:64:0.001:vote"
        )
    for name in ("cache", "paraphrases"):
        if getattr(settings, name) is not None:
            raise UserError(f"{setting(name)} does not go together with {setting('threat', 'rotation')}: leave it out")
    if settings.radius is not None and settings.radius > MOST_ANGLE:
        raise BadSetting("radius", f"is an angle, at most {MOST_ANGLE:g} degrees", got=settings.radius)


def chosen_noise(model: str) -> LocalNoise | None:
    """Return how a model chooses the noise level of an image; None where it is the same for all.

    Example:
        >>> chosen_noise("tiny+dual:0.02,0.05:0.1:0.05").sigmas, chosen_noise("tiny+smooth:0.1") is None
        ((0.02, 0.05), True)
    """
    from robustvlm.defenses.local_noise import read_dual

    dual = [part for part in split_spec(model)[1] if part.name == "dual"]
    return read_dual(str(dual[0])) if dual else None


def _require_fixed_or_chosen(claim: Claim, settings: CertifySettings) -> None:
    """Refuse what is not certified of a model that chooses the noise for each image.

    Raises:
        UserError: another claim than that on its class, a head that refuses, or samples that are not of a number fixed
            beforehand.
    """
    if chosen_noise(settings.model) is None:
        return
    base = split_spec(settings.model)[0]
    made = saved_model(base)
    if made is not None and made.refuses:
        raise UserError(
            f"'{settings.model}': the copies of an immunised model vote under one noise for all images: pass "
            f"{base}+smooth:SIGMA:N0:ALPHA:vote"
        )
    if claim not in (VOTE, CLASS):
        raise UserError(
            f"'{settings.model}' chooses the noise of an image by its classes, and what is certified of it is the "
            f"class: pass {setting('claim', CLASS.name)} or {setting('claim', VOTE.name)}, or leave it out"
        )
    for name in ("radius", "cache"):
        if getattr(settings, name) is not None:
            raise UserError(
                f"{setting(name)} is for noise that is the same for all images: leave it out, or pass the encoder "
                "below with +smooth"
            )


def _require_words(claim: Claim, settings: CertifySettings) -> None:
    """Refuse paraphrases for what is not certified for all of them.

    Raises:
        UserError: another claim, samples that are not of a number fixed beforehand, or classes that are no texts.
    """
    if settings.words is not None and (settings.paraphrases is None or claim is not VOTE):
        raise UserError(
            f"{setting('words')} is for copies that vote, each by one of several wordings: pass "
            f"{setting('claim', VOTE.name)} and {setting('paraphrases')}"
        )
    if settings.words is not None and declared_rule(settings.model) is not None:
        raise UserError(
            f"'{settings.model}' answers by the usual texts, and {setting('words')} is about another rule: leave out "
            "ALPHA, or deploy robustvlm.defenses.mixed_wordings.MixedWordings"
        )
    if settings.paraphrases is None:
        return
    if claim not in (VOTE, CLASS):
        raise UserError(
            f"all {setting('paraphrases')} at once are certified of a class: pass {setting('claim', CLASS.name)} or "
            f"{setting('claim', VOTE.name)}"
        )
    for name in ("radius", "from_cache"):
        if getattr(settings, name) is not None:
            raise UserError(f"{setting('paraphrases')} and {setting(name)} do not go together: leave out one of them")
    if chosen_noise(settings.model) is not None:
        raise UserError(
            f"'{settings.model}' chooses its noise by the usual texts: leave out {setting('paraphrases')}, or pass "
            "the encoder below with +smooth"
        )


def _require_own_rule(claim: Claim, settings: CertifySettings) -> None:
    """Refuse to certify a class by another rule than the one by which the model answers."""
    rule = declared_rule(settings.model)
    theirs = None if rule is None else _claim_of_rule(settings.model, rule)
    rivals = (CLASS, VOTE, OPENSET, OPEN_VOTE) if theirs is OPEN_VOTE else (CLASS, VOTE)
    if theirs is not None and claim in rivals and claim is not theirs:
        how = "mean" if theirs is CLASS else "vote"
        raise UserError(
            f"'{settings.model}' answers by the {how} of its copies, and the claim '{claim.name}' is about another "
            f"rule: leave out {setting('claim')}, or pass {setting('claim', theirs.name)}"
        )


def counted_at(settings: CertifySettings, sigma: float, *, degrees: Sequence[float] | None = None) -> list[float]:
    """Return the radii at which the summary counts certified images: those given, else `degrees`, else by sigma."""
    if settings.at is None:
        chosen = {round(sigma * part, 6) for part in _AT_SIGMAS} if degrees is None else set(degrees)
        return sorted(chosen | ({settings.radius} if settings.radius is not None else set()))
    try:
        values = [float(part) for part in settings.at.split(",")]
    except ValueError:
        raise UserError(f"cannot read the radii '{settings.at}': expected numbers, as 0.1,0.25,0.5") from None
    for value in values:
        _positive("at", value)
    return sorted(set(values))


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0.0 and math.isfinite(value)):
        raise BadSetting(name, "must be a positive number", got=value)


def make_config(settings: CertifySettings, *, noise: Noise, device: str) -> CertifyConfig:
    """Return the configuration of a run that samples; its resolution is the model's and not settled yet."""
    claim = find_claim(claim_of(settings))
    stored = settings.stored(
        claim=claim_of(settings),
        sigma=noise.sigma,
        threat=None if noise.threat.name == PLAIN else noise.threat.name,
        n_pilot=claim.pilot(settings.samples, early=settings.radius is not None),
        alpha=DEFAULT_ALPHA if settings.alpha is None else settings.alpha,
        min_cos=settings.min_cos if "min_cos" in claim.options else None,
        at=counted_at(settings, noise.sigma, degrees=_AT_DEGREES if isinstance(noise.threat, Rotation) else None),
        weight=settings.weight if "weight" in claim.options else 0.0,
        top=settings.top if "top" in claim.options else None,
        dual=None if (chosen := chosen_noise(settings.model)) is None else str(chosen),
        prompts=None,
        lanes=settings.lanes or (512 if device.startswith("cuda") else 128),
        device=device,
        resolution=0,
    )
    return CertifyConfig(**stored)


# What settings and model settle together


def plan_of(config: CertifyConfig, materials: Materials) -> Plan:
    """Return the plan of a run's claim; a part of alpha pays for the noise, where its law is known up to rounding.

    Samples whose laws are off by d each (total variation) are off by n d together, so that a bound fails with
    probability at most its alpha plus n d.

    Raises:
        UserError: what was set aside does not pay for so many copies.
    """
    bounds = config.bounding
    if config.dual is not None:
        claim = find_claim(config.claim)
        return local_plan(claim, read_local_noise(config.dual), bounds, materials, votes=claim is VOTE)
    if isinstance(config.against.threat, Rotation):
        return rotation_plan(find_claim(config.claim), config, materials)
    if materials.wordings is None:
        plan = make_plan(config.claim, bounds, materials)
    else:
        claim = find_claim(config.claim)
        plan = (
            worded_plan(claim, bounds, materials, votes=claim is VOTE)
            if config.words is None
            else words_plan(claim, bounds, materials, config.words)
        )
    if bounds is config:
        return plan
    _require_law(config)
    aside = config.alpha * ASIDE
    return replace(plan, alpha_split=plan.alpha_split | {"law of the noise (total variation)": aside})


def _require_law(config: CertifyConfig) -> None:
    """Refuse more copies than what is set aside pays for; those of a model that abstains, at its own alpha."""
    height, width = sides(config.resolution)
    off = config.against.threat.off_law(3 * height * width, config.sigma)
    exact = f"the law of the noise is exact to {off:.1e} a copy, which is too much for"
    copies, aside = max(config.samples, config.deployed or 0), config.alpha * ASIDE
    if copies * off > aside:
        fewer = f"at most {int(aside / off):,} of them, or " if aside >= 2 * off else ""
        raise UserError(f"{exact} {copies:,} copies at so small an alpha: pass {fewer}a larger {setting('alpha')}")
    kept = config.deployed or 0
    if config.abstains_at is not None and kept * off > config.abstains_at * ASIDE:
        raise UserError(
            f"{exact} a model that abstains at alpha {format_exact(config.abstains_at)} over {kept:,} copies: pass one "
            f"with an ALPHA of at least {kept * off / ASIDE:.1e}"
        )


def settle_noise(settings: CertifySettings) -> Noise:
    """Return the noise: that of a model that is smoothed already, or the one given; both must agree."""
    base, operations = split_spec(settings.model)
    smoothing = [part for part in operations if part.name in ("smooth", "dual")]
    made = saved_model(base)
    within = None if made is None else made.noise
    if len(smoothing) + (within is not None) > 1:
        raise UserError(f"'{settings.model}' is smoothed twice: certify one +smooth at a time")
    if not smoothing and within is None:
        threat = find_threat(settings.threat)
        return Noise(threat, threat.usual if settings.sigma is None else settings.sigma)
    chosen = chosen_noise(settings.model)
    if chosen is not None:
        within = Noise(find_threat(PLAIN), chosen.at)
    if within is None:
        if not smoothing[0].arguments:
            raise UserError(f"'+{smoothing[0]}' must be written +{FORM}, as +smooth:0.25")
        within = read_noise(smoothing[0].arguments[0])
    wanted = find_threat(settings.threat)
    if chosen is None and wanted.smoothed_by == within.threat.name:  # the model's noise, held against another threat
        within = Noise(wanted, within.sigma)
    for name, mine in (("threat", within.threat.name), ("sigma", within.sigma)):
        given = getattr(settings, name)
        if name == "threat" and given is not None:
            given = find_threat(given).name  # a map is known by what is in it
        if given is not None and given != mine:
            said = given if isinstance(given, str) else format_exact(given)
            raise UserError(
                f"'{settings.model}' is smoothed with noise of {within}, and {setting(name)} says {said}: leave out "
                f"{setting(name)}"
            )
    return within


def settle_deployed(settings: CertifySettings, vlm: VLM) -> int | None:
    """Return how many copies the deployed model averages over: those of a smoothed model, else those asked for.

    Raises:
        UserError: the smoothed model averages over another number than the one asked for.
    """
    if not isinstance(vlm, SmoothedVLM):
        return settings.deployed
    if settings.deployed not in (None, vlm.n0):
        raise UserError(
            f"'{settings.model}' is deployed with {vlm.n0:,} copies, and {setting('deployed')} says "
            f"{settings.deployed:,}: leave it out, or write the number into the model, as +smooth:0.25:1000"
        )
    return vlm.n0


def settle_abstention(config: CertifyConfig, vlm: VLM) -> float | None:
    """Return the alpha at which the deployed model withholds its class, where the claim is about that class."""
    rule = vlm.rule if isinstance(vlm, SmoothedVLM) else None
    return rule.alpha if rule is not None and find_claim(config.claim) in (CLASS, VOTE, OPEN_VOTE) else None


def noise_of(
    config: CertifyConfig, model: dict[str, Any], class_names: tuple[str, ...], templates: tuple[str, ...]
) -> str:
    """Return the digest of all that decides a run's certificates; see `robustvlm.certify.noise` for what it is for."""
    texts = {"classes": class_names, "templates": templates, "antibodies": antibodies_of(config)}
    if config.paraphrases is not None:
        texts |= {"paraphrases": paraphrases_in(config.paraphrases)}
    return noise_settings(config, model, texts | ({"claim": (model["claim"],)} if "claim" in model else {}))


def prompts_of(config: CertifyConfig, model: dict[str, Any], templates: tuple[str, ...]) -> str | None:
    """Return the digest of what tells the classes of a claim apart beside their names; None where none are told."""
    if not find_claim(config.claim).needs_classes:
        return None
    more = [] if config.paraphrases is None else [list(paraphrases_in(config.paraphrases))]
    return settings_digest(list(templates), list(antibodies_of(config)), config.weight, model.get("head"), *more)


def certified_model(vlm: VLM, config: CertifyConfig, class_names: Sequence[str]) -> VLM:
    """Return the encoder whose answers behind the noise a claim is about, of a model as it is loaded.

    That is the model itself; of one that answers in words, for claims about classes, its answers: the noise then stands
    before all of it, and what is counted are the answers to noisy copies.

    Raises:
        UserError: another claim about classes than that on counted answers: nothing deploys the mean of their
            probabilities, and there are no texts of classes to compare a mean feature with; or a rule of abstention
            that no command answers by.
    """
    claim, made = find_claim(config.claim), saved_model(split_spec(config.model)[0])
    if claim.head == "votes" and made is not None:
        return made.voting(vlm, class_names, config.against)
    elsewhere = speaker_of(vlm) is not None or (made is not None and made.refuses)
    if claim.needs_classes and elsewhere and isinstance(vlm, SmoothedVLM) and vlm.rule is not None:
        raise UserError(
            f"'{config.model}' cannot abstain: the rule of +smooth:SIGMA:N0:ALPHA is for classes told apart by their "
            "texts or vectors, right behind the smoothing; leave out ALPHA"
        )
    if speaker_of(vlm) is None and claim is NAMED:
        raise UserError(
            f"'{config.model}' does not answer in words: the claim 'named' is about what mllm:NAME#QUESTION says"
        )
    if speaker_of(vlm) is None or not claim.needs_classes:
        return vlm
    if claim not in (VOTE, NAMED):
        raise UserError(
            f"'{config.model}' answers in words: pass {setting('claim', 'vote')} (the answer to most noisy copies), "
            f"{setting('claim', 'named')} (the class that most of them name in words), or "
            f"{setting('claim', 'feature')} (its image tokens); '{config.claim}' is about texts of classes"
        )
    if config.cache is not None:
        raise UserError(
            f"the answers of '{config.model}' cannot be kept for other prompts: leave out {setting('cache')}, which "
            f"is for features ({setting('claim', 'feature')})"
        )
    return answers_of(vlm, class_names, in_words=claim is NAMED)


def describe_head(
    config: CertifyConfig, class_names: tuple[str, ...], gallery: Gallery | None = None
) -> dict[str, Any]:
    """Return the digest of what a model decides by besides its encoder, where a claim is about that; else nothing.

    Beside it that of the claim, if it is code of the user's own.
    """
    own_claim = {"claim": own_digest(config.claim)} if is_own(config.claim) else {}
    if gallery is not None:
        return {"head": gallery.digest} | own_claim
    rule = rule_of(config, class_names)
    if rule is not None:
        parts = (rule.prototypes, rule.antibodies, rule.thresholds)
        tensors = {str(i): torch.from_numpy(np.ascontiguousarray(part)) for i, part in enumerate(parts)}
        score = (repr(rule.weight),) if rule.floor is None else (repr(rule.weight), repr(rule.floor))
        return {"head": fingerprint(tensors, score)} | own_claim
    own = own_vectors(config, class_names)
    return ({} if own is None else {"head": fingerprint({"class_vectors": own}, ())}) | own_claim


_FLOATING = "up to floating point: noise and sum in float32"


def _allowed(threat: Threat) -> str:
    plain = "whose l2 distance is below the radius, pixels in [0, 1]"
    return plain if threat.name == PLAIN else f"that {threat.allows}"


def describe_plan(plan: Plan, config: CertifyConfig, best: float) -> dict[str, Any]:
    """Return what a reader of the run has to know of its claim: statement, bounds and threat model."""
    (height, width), claim = sides(config.resolution), find_claim(config.claim)
    own = is_own(config.claim)
    axes = config.against.threat.half_axes((3, height, width))
    return (
        {
            "statement": plan.statement,
            "rule": plan.rule,
            "deployed": claim.deployed_rule(config, stated=plan.deployed),
            "theorem": plan.theorem,
            "bound": plan.bound,
            "stop_rule": plan.stop_rule,
            "alpha_split": plan.alpha_split,
            "best_radius": best,
            "notes": [OWN_CLAIM.format(spec=config.claim)] if own else [],
            "threat": [
                f"every image {_allowed(config.against.threat)}, measured at {height} x {width} where the noise is "
                "added; of changes made before an image was resized nothing is stated",
                ("whole numbers, summed exactly" if config.against.threat.exact else _FLOATING)
                + ", the encoder in the precision stated; the noise is not clipped, and what the encoder does after it "
                "(clamping, rounding) is part of the encoder",
            ],
        }
        | ({"claim": asdict(claim.facts)} if own else {})
        | ({} if axes is None else {"half_axes": list(axes)})
    )
