"""A methods paragraph for a paper, from a run's settings alone: what was done, with the papers that it rests on.

Citations stand as `[@key; @key]` in the text that is made first; `Methods` shows it for readers and as LaTeX.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from robustvlm.attacks.base import ATTACKS, LaneAttack
from robustvlm.attacks.catalog import parse_attacks
from robustvlm.attacks.goals import goal_words
from robustvlm.certify.threats import PLAIN, Threat, find_threat
from robustvlm.errors import UserError
from robustvlm.report.copies import latex_words
from robustvlm.report.sources import bibliography, cited, named_in, of, papers
from robustvlm.report.words import copies_counted, count_of, norm_name, plain
from robustvlm.runs.manifest import trained_on_attacks
from robustvlm.runs.records import Drawn
from robustvlm.runs.tools import versions_of

Manifest = Mapping[str, Any]

_CITED = re.compile(r"\[@([\w-]+(?:; @[\w-]+)*)\]")
_EXACT = "Intervals of shares are exact 95% Clopper-Pearson intervals [@clopper1934]."
_TITLES = {
    "pgd": "PGD",
    "fgsm": "FGSM",
    "apgd-ce": "APGD on cross-entropy",
    "apgd-dlr": "APGD on the DLR loss",
    "apgd-t": "targeted APGD",
    "fab": "FAB",
    "fab-t": "targeted FAB",
    "square": "the Square Attack",
    "fmn": "FMN",
}
_BOUNDS = {
    "ell": "bands of equal local levels [@moscovich2017]",
    "betting": "bounds by betting [@waudbysmith2024]",
    "clopper-pearson": "exact binomial bounds [@clopper1934]",
    "tangent": "bets on scores whose mean decides the claim (docs/certify.md, T6) [@waudbysmith2024]",
    "index": "bands from single order statistics",
    "pinelis+kl": "a bound of how far the mean feature may lie from what was kept of it (docs/certify.md, T21)",
}
"""Bounds of certificates in words; another is named as in the manifest."""


@dataclass(frozen=True)
class Methods:
    """A paragraph with its citations.

    Example:
        >>> made = Methods("We used PGD [@madry2018] at 50%.")
        >>> made.text, made.latex
        ('We used PGD (Madry et al., 2018) at 50%.', 'We used PGD~\\\\citep{madry2018} at 50\\\\%.')
    """

    marked: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The papers cited, each once; what only looks like a citation, in a name from outside, is none."""
        return tuple(dict.fromkeys(key for found in _CITED.finditer(self.marked) for key in _known(found)))

    @property
    def text(self) -> str:
        """The paragraph for readers."""
        return re.sub(r" ?" + _CITED.pattern, lambda found: cited(_known(found)) or found[0], self.marked)

    @property
    def latex(self) -> str:
        """The paragraph as LaTeX, for natbib."""
        made, end = "", 0
        for found in _CITED.finditer(self.marked):
            if keys := _known(found):
                made += latex_words(self.marked[end : found.start()].rstrip()) + f"~\\citep{{{','.join(keys)}}}"
                end = found.end()
        return made + latex_words(self.marked[end:])

    @property
    def bibtex(self) -> str:
        """The entries of the papers cited."""
        return bibliography(self.keys)


def _known(found: re.Match[str]) -> list[str]:
    keys = found[1].split("; @")
    return keys if all(key in papers() for key in keys) else []


def methods_of(manifest: Manifest, *, drawn: Drawn | None = None) -> Methods:
    """Return the methods paragraph of a run, from its manifest.

    Args:
        drawn: how an attack run asked a random model, which only its summary tells; None where it is not random.

    Raises:
        UserError: a run of this kind has none, or its settings are those of another version.

    Example:
        >>> config = {"model": "m", "data": "d", "attack": ["pgd:steps=3"], "norm": "Linf", "eps_text": ["2/255"]}
        >>> text = methods_of({"kind": "attack", "config": config}).text
        >>> "PGD (Madry et al., 2018) with 3 steps and 1 restart" in text
        True
    """
    kind = str(manifest["kind"])
    if kind not in _KINDS:
        raise UserError(f"a run of kind '{plain(kind, 40)}' has no methods text: there is one of {', '.join(_KINDS)}")
    known = manifest if drawn is None else {**manifest, "drawn": drawn}
    try:
        return Methods(" ".join([*_subject(kind, manifest), *_KINDS[kind](known), *_program(manifest)]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"this run's manifest is another version's ({error!r}): make the run again") from None


def has_methods(manifest: Manifest) -> bool:
    """Whether a run's kind has a methods text."""
    return manifest.get("kind") in _KINDS


def _cite(keys: Iterable[str]) -> str:
    return " [@" + "; @".join(keys) + "]" if (keys := tuple(dict.fromkeys(keys))) else ""


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# What every kind has: model and data, program and seed


def _subject(kind: str, manifest: Manifest) -> Iterator[str]:
    config, model, data = manifest["config"], manifest.get("model") or {}, manifest.get("data") or {}
    trained = "mapper of features" if _mapper_alone(config) else "purifier"
    verb = {"finetune": "fine-tuned", "purify": f"trained a {trained} for", "immunize": "immunised"}.get(
        kind, "evaluated"
    )
    size = model.get("image_size")
    at = " at {} x {} pixels".format(*(size if isinstance(size, list) else (size, size))) if size else ""
    print_ = f" (fingerprint {str(model['fingerprint'])[:12]})" if model.get("fingerprint") else ""
    spec, known = plain(config["model"], 120), plain(config.get("data") or config.get("known"), 120)
    total, limit = data.get("images"), config.get("limit")
    fewer = bool(total and limit and limit < total)
    some = f"{limit:,} of the {total:,} images" if fewer else f"the {total:,} images" if total else "the images"
    digest = f" (digest {str(data['fingerprint'])[:12]})" if data.get("fingerprint") else ""
    chosen = ", chosen by a hash of their ids" if fewer else ""
    where = "with" if kind == "purify" else "on"
    if kind == "immunize" and not config.get("images", True):
        where, some, chosen = "for", "the classes", ""
    yield f"We {verb} the model {spec}{print_}{at} {where} {some} of {known}{digest}{chosen}."
    names, templates = data.get("class_names") or [], data.get("templates") or []
    if names and templates and model.get("logit_scale") is not None:
        prompts = f'the prompt "{plain(templates[0], 80)}"' if len(templates) == 1 else f"{len(templates)} prompts"
        yield f"Images are classified zero-shot into {count_of(len(names), 'classes')} with {prompts} [@radford2021]."


def _program(manifest: Manifest) -> Iterator[str]:
    seed, used = manifest["config"].get("seed"), {key: versions_of(manifest, key) for key in _PACKAGES}
    said = [f"{name} {_listed(plain(one, 30) for one in used[key])}" for key, name in _PACKAGES.items() if used[key]]
    drawn = f" Random draws follow from the seed {seed}." if seed is not None else ""
    yield f"We used {_listed(said or ['robustvlm'])} on {plain(manifest.get('device') or 'a CPU', 80)}.{drawn}"


_PACKAGES = {"robustvlm": "robustvlm", "torch": "PyTorch", "python": "Python"}


# Attacks


def attack_words(name: str, *, steps: int | None = None, restarts: int | None = None) -> str:
    """Return an attack as a methods section names it, with its strength; the user's own by its name alone.

    Example:
        >>> attack_words("apgd-t")
        'targeted APGD [@croce2020apgd] with 100 steps and 9 targets'
        >>> attack_words("square:queries=100"), attack_words("mine:attack")
        ('the Square Attack [@andriushchenko2020] with 100 queries', 'mine:attack')
    """
    base = name.partition(":")[0]
    said = f"{_TITLES.get(base, plain(name, 80))}{_cite(of('attack', name))}"
    try:
        (made,) = parse_attacks(name, steps=steps, restarts=restarts) if base in ATTACKS else (None,)
    except UserError:  # an option that a later version dropped
        return f"{said} ({plain(name, 80)})"
    if not isinstance(made, LaneAttack) or base == "fgsm":
        return said
    targets, usual = getattr(made, "n_targets", None), ATTACKS[base]().objective
    strength = [count_of(made.n_iter, "steps" if made.uses_gradient else "queries")]
    strength += [count_of(targets, "targets")] if targets else []
    strength += [count_of(made.n_restarts, "restarts")] if made.n_restarts > 1 or base == "pgd" else []
    strength += [f"the objective {made.objective.name}"] if made.objective.name != usual.name else []
    return f"{said} with {_listed(strength)}"


def _ball(norm: str, radii: Iterable[str]) -> str:
    return f"{norm_name(norm)} perturbations of at most {_listed(plain(one, 20) for one in radii)}"


def _attack(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    goal = config.get("goal") or "misclassify"
    rejects = bool((manifest.get("model") or {}).get("can_reject"))
    cosine = config.get("min_cos") if goal.startswith("feature") else None
    abstains = bool((manifest.get("model") or {}).get("abstains"))
    words = goal_words(plain(goal, 80), can_reject=rejects, min_cos=cosine, abstains=abstains)
    yield (
        f"The attacker knows the whole model, and adds {_ball(config['norm'], config['eps_text'])} to the image, "
        f"pixels in [0, 1], to {words.effect} it."
    )
    strength = {"steps": config.get("steps"), "restarts": config.get("restarts")}
    yield f"The attacks were {_listed(attack_words(name, **strength) for name in config['attack'])}."
    left = "every attack runs on the images that those before it left standing, and " if words.leave else ""
    yield f"The worst case counts: {left}an image is robust only if no attack reached its goal at this radius or below."
    if config.get("second_opinion"):
        yield f"The images left standing were attacked once more by {attack_words(config['second_opinion'])}."
    yield from _draws(config, manifest.get("drawn"))
    yield from _counting_once(config)


def _draws(config: Mapping[str, Any], drawn: Drawn | None) -> Iterator[str]:
    """Say how a random model was asked and judged; of runs that did not note it, what their settings say."""
    eot = drawn.eot if drawn is not None else config.get("eot") or 1
    draws = drawn.draws if drawn is not None else config.get("draws") if eot > 1 else None
    if eot > 1:
        yield f"Gradients are averaged over {eot} draws of the random model [@athalye2018eot]."
    elif drawn is not None:
        yield "The model is random; each gradient is of one draw."
    if draws == 1:
        yield "One draw decides on a success."
    elif draws:
        more = f", and then in that of {drawn.upholding} more" if drawn is not None and drawn.upholding else ""
        yield f"A success must hold in the majority of {draws} fresh draws{more}."


def _counting_once(config: Mapping[str, Any], *, paired: bool = False) -> Iterator[str]:
    """Say what intervals are, and `paired` tests, that take copies of one thing for one case, where there are any."""
    yield _EXACT
    if copies_counted(config.get("data")):
        tests = ", and tests randomise the signs of the differences over all copies of a thing" * paired
        yield f"Where the report says that copies of one thing count once, intervals are of that many cases{tests}."


def _judge(manifest: Manifest) -> Iterator[str]:
    from robustvlm.defenses.specs import split_spec
    from robustvlm.defenses.zoo.base import DEFENCES, IDENTITY
    from robustvlm.defenses.zoo.unpublished import unpublished

    config = manifest["config"]
    found, constant = [], ""
    for spec in str(config["model"]).split(","):
        for operation in split_spec(spec.strip())[1]:
            if operation.name in DEFENCES and unpublished(operation.name, operation.arguments) is None:
                about = DEFENCES[operation.name].about
                found.append(f"{about.title}{_cite(named_in(about.reference))}")
                if IDENTITY in DEFENCES[operation.name].modes:
                    constant = ", where there is one with what the defence adds taken for a constant (BPDA)"
                    constant += " [@athalye2018bpda]"
    if found:
        yield f"The defences, all re-implemented, were {_listed(dict.fromkeys(found))}."
    yield (
        f"The attacker adds {_ball(config['norm'], [config['eps_text']])}, pixels in [0, 1]. Attacks unaware of a "
        f"defence are PGD [@madry2018] and APGD [@croce2020apgd] on the undefended model; adaptive ones differentiate "
        f"through the defence in every gradient mode that it declares{constant}, and also attack features; all take "
        f"{config['steps']} steps."
    )
    if config.get("queries"):
        yield f"What is left is attacked by the Square Attack with {config['queries']} queries [@andriushchenko2020]."
    yield (
        "Robust accuracy is the worst case over all of them. It is compared with that of the undefended model on the "
        "same images by McNemar's exact test [@mcnemar1947], adjusted over the defences by Holm's method [@holm1979]."
    )
    yield from _counting_once(config, paired=True)


# Certificates


def _noise(config: Mapping[str, Any], name: str) -> str:
    """Say which noise was drawn, against which threat."""
    level = f"of standard deviation {config['sigma']:g}"
    if name == PLAIN:
        return f"with Gaussian noise {level} in pixels on a scale from 0 to 1, added in float32 and not clipped"
    known = _threat_of(name)
    if known is not None and known.smoothed_by != name:
        return f"against the threat {name}, {_noise(config, known.smoothed_by)}"
    kind = "Gaussian noise" if known is not None and known.gaussian else "noise"
    return f"against the threat {plain(name, 40)}, with {kind} {level}" + (f" ({known.unit})" if known else "")


def _threat_of(name: str) -> Threat | None:
    """Return the threat of that name; None where this release has none."""
    try:
        return find_threat(name)
    except UserError:
        return None


def _allows(name: str) -> str:
    known = _threat_of(name)
    return f"the threat {plain(name, 20)} allows within the radius" if known is None else plain(known.allows, 400)


def _certify(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    plan, claim = manifest.get("plan") or {}, str(config["claim"])
    name = str(config.get("threat") or PLAIN)
    behind = _cite((*of("claim", claim), *of("threat", name)))
    yield f"We certified by randomised smoothing{behind} {_noise(config, name)}."
    if plan.get("statement"):
        said = plain(plan["statement"], 400)
        every = "every change of L₂ length below the radius" if name == PLAIN else f"every image that {_allows(name)}"
        yield f"The certificate states: {said}, for {every}."
    named = str(plan.get("bound") or "")
    bound = f", with {_BOUNDS.get(named, f'the bound {plain(named, 40)}')}" if named else ""
    yield (
        f"Every image got at most {config['samples']:,} noisy copies, {config['n_pilot']:,} of them for choices only"
        f"{bound}; the certificate of an image is false with probability at most {config['alpha']:g}."
    )
    if config.get("radius") is not None:
        yield f"It was asked for at the radius {config['radius']:g}."
    if config.get("min_cos") is not None:
        yield f"The cosine asked for was {config['min_cos']:g}."
    yield "Radii are rounded down, and an abstention counts as the radius 0."
    yield from _counting_once(config)


# Evaluation


def _evaluate(manifest: Manifest) -> Iterator[str]:
    names = (manifest.get("data") or {}).get("class_names") or []
    if names:
        yield (
            "We report top-1 and top-5 accuracy, the mean over classes of their recall, the expected calibration error "
            "with 15 bins of equal width [@guo2017], and how evenly accuracy is spread over the parts of a class "
            "(MacroStd) [@chiu2023], with 95% intervals from bootstrap draws over images."
        )
        yield from _corruptions(manifest)
        yield from _counting_once(manifest["config"])
        return
    yield (
        "Images and captions are compared by the cosine of their features [@radford2021]; recall at k counts an image "
        "if one of its captions is among the k most similar ones, and a caption if its image is. A tie counts against."
    )
    yield _EXACT


def _corruptions(manifest: Manifest) -> Iterator[str]:
    text = manifest["config"].get("corrupt")
    if not text:
        return
    asked = [one.partition(":") for one in str(text).split(",")]
    kinds, severities = {kind for kind, _, _ in asked}, sorted({severity for _, _, severity in asked})
    if len(kinds) == 15 and len(asked) == len(kinds) * len(severities):
        what = "the 15 common corruptions"
        at = f" at {'severity' if len(severities) == 1 else 'severities'} {_listed(severities)}"
    else:
        what, at = f"common corruptions ({plain(str(text), 2000)}: kind and severity)", ""
    yield (
        f"Images were also shown under {what} of [@hendrycks2019]{at}, made of them as the model sees them, with the "
        "authors' constants for the nearest image size; frost's ice is drawn. Means are over severities, then over "
        "kinds."
    )


# Detection


def _detect(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    unknown = _listed(plain(one["spec"], 80) for one in config["unknown"])
    yield f"These images are of known classes; those of {unknown} are of unknown ones."
    yield f"The scores were {_listed(_score(name) for name in config['scores'])}; higher means more likely known."
    if config.get("fit"):
        yield f"Scores that learn from images were fitted to {plain(config['fit'], 80)}."
    yield from _corruptions(manifest)
    attacked = config.get("under_attack")
    if attacked:
        ball = _ball(attacked["norm"], [attacked["eps_text"]])
        yield (
            f"At most {attacked['limit']} images of every set were attacked with {ball} through the encoder and each "
            f"score, by {_listed(attack_words(name) for name in attacked['attack'])}: "
            "known images until they are refused, unknown ones until they are accepted."
        )
    yield (
        "Intervals of AUROCs are DeLong's [@delong1988], of shares exact Clopper-Pearson intervals [@clopper1934], of "
        f"other metrics from {config.get('draws', 1000):,} bootstrap draws, all at 95%. Differences to the best "
        "baseline are tested by the paired bootstrap, adjusted by Holm's method [@holm1979]."
    )


def _score(name: str) -> str:
    from robustvlm.detect import SCORES

    if name not in SCORES:
        return plain(name, 60)
    return f"{SCORES[name].title}{_cite(named_in(SCORES[name].source))}"


# Training


def _finetune(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    method, part = str(config["method"]), str(config.get("trainable") or "all")
    trained = "all weights of the vision tower" if part == "all" else f"{plain(part, 40)} of the vision tower"
    trained += _cite(of("trainable", part))
    yield f"The method was {plain(method, 60)}{_cite(of('method', method))}; trained were {trained}."
    if config.get("inner_steps") and trained_on_attacks(manifest):
        yield (
            f"Training images were attacked by PGD [@madry2018] with {count_of(config['inner_steps'], 'steps')} and "
            f"{_ball(config['norm'], [config['eps_text']])}, pixels in [0, 1]."
        )
    yield _optimiser(config)
    yield (
        "The weights with the best validation were kept, without labels to validate by the last; what they reach there "
        "is no estimate of robustness."
    )


def _optimiser(config: Manifest) -> str:
    long = f" for {config['epochs']:g} epochs" if config.get("epochs") else ""
    long = long or (f" for {count_of(config['steps'], 'steps')}" if config.get("steps") else "")
    decay = f", weight decay {config['weight_decay']:g}" if config.get("weight_decay") is not None else ""
    return (
        f"We trained{long} in batches of {config['batch_size']} images with AdamW [@loshchilov2019], learning rate "
        f"{config['lr']:g}{decay}, in {plain(config.get('precision') or 'fp32', 20)}."
    )


def _purify(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    sigmas = _listed(f"{one:g}" for one in config["sigma"])
    only, mapper_alone = config.get("only"), _mapper_alone(config)
    parts = "the purifier of pixels" if only == "purifier" else "purifier and mapper"
    parts = "the mapper of features" if mapper_alone else parts
    if config.get("denoiser") and mapper_alone:
        parts += f" behind the denoiser {plain(config['denoiser'], 80)}, which is not ours"
    yield f"Following feature-space smoothing [@xia2026], we trained {parts}, for Gaussian noise {sigmas}."
    if not mapper_alone:
        if config.get("eps"):
            steps = count_of(config.get("inner_steps") or 3, "steps")
            ball = _ball(str(config.get("norm") or "Linf"), [config["eps"]])
            yield f"Training images were attacked under the noise by PGD [@madry2018] with {steps} and {ball}."
        if config.get("text_weight"):
            weight = f"{config['text_weight']:g}"
            yield f"The loss holds the divergence of the classes read off clean and purified images, weight {weight}."
        yield f"{_optimiser(config)} Noise levels and preconditioning follow the EDM design [@karras2022]."
    if only != "purifier":
        yield f"The mapper was trained for {config['mapper_steps']:,} steps with learning rate {config['mapper_lr']:g}."


def _mapper_alone(config: Manifest) -> bool:
    """Whether a purifying run trained no purifier: none was asked for, or a denoiser of others stands in its place."""
    return config.get("only") == "mapper" or bool(config.get("denoiser"))


def _immunize(manifest: Manifest) -> Iterator[str]:
    config = manifest["config"]
    source = plain(config["antibodies"], 80)
    texts = {"none": "no antibodies", "noise": "random directions for antibodies (a baseline)"}.get(
        source, f"texts that are near but outside the classes (antibodies: {source})"
    )
    if not config.get("images", True):
        images = config.get("calibrate")
        sets = f"score and thresholds set on images of {plain(images, 80)}" if images else "thresholds at 0"
        yield f"The method follows Immuno-VLM [@fang2026], with classes from texts alone: {texts}, no adapter, {sets}."
        return
    learnt = f"an adapter trained for {count_of(config['steps'], 'steps')}, " if config.get("steps") else ""
    held = plain(config.get("held_out") or "a part of the data", 80)
    yield (
        f"The method follows Immuno-VLM [@fang2026]: prototypes of classes, {texts}, {learnt}and thresholds that "
        f"refuse {100 * config['miss']:g}% of held-out known images ({held})."
    )
    yield "Intervals of AUROCs are DeLong's [@delong1988]."
    yield from _counting_once(config)


_KINDS: dict[str, Callable[[Manifest], Iterator[str]]] = {
    "attack": _attack,
    "certify": _certify,
    "detect": _detect,
    "evaluate": _evaluate,
    "judge": _judge,
    "finetune": _finetune,
    "purify": _purify,
    "immunize": _immunize,
}
