"""What the options of a detect run name, read with the libraries that know it: scores, unknown sets and attacks."""

from __future__ import annotations

import re

from robustvlm.attacks import DEFAULT_EPS, LaneAttack, ThreatModel, parse_attacks, parse_eps, parse_norm
from robustvlm.commands.detect import DetectSettings
from robustvlm.commands.detect.summary import KNOWN, OWN, OWN_SDIS, NamedData, UnderAttack
from robustvlm.core.registry import names_own
from robustvlm.data.specs import parse_spec
from robustvlm.detect import SCORES, parse_scores
from robustvlm.detect.base import require_temperature
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.text import without_secrets

_TAKEN = (KNOWN, "fit", "adversarial")
_NAMED = re.compile(r"([A-Za-z0-9][\w-]{0,39})=(.+)")
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
        match = _NAMED.fullmatch(text)
        name, spec = match.groups() if match else (_short_name(text), text)
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
