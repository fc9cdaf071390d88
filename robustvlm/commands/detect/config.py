"""What defines a detect run: its words, checked before anything is loaded, its settings, and who watches it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from robustvlm.attacks import DEFAULT_EPS, LaneAttack, ThreatModel, parse_attacks, parse_eps, parse_norm
from robustvlm.core.registry import names_own
from robustvlm.data.specs import parse_spec
from robustvlm.detect import SCORES, parse_scores
from robustvlm.detect.base import require_temperature
from robustvlm.errors import UserError, nearest
from robustvlm.text import without_secrets

# What defines a detect run: the settings that decide its scores


class NamedData(BaseModel):
    """A set of unknown images: the name that tables show, and its data spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    spec: str


class UnderAttack(BaseModel):
    """How scores are attacked.

    Args:
        scores: those that are attacked, each for its own sake.
        limit: images per set; lanes: rows of a batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: list[str]
    attack: list[str]
    norm: str
    eps: float
    eps_text: str
    limit: int
    lanes: int


class DetectConfig(BaseModel):
    """Every setting that the rows of a detect run depend on; a run is resumed only under an equal one.

    Args:
        known, fit: data of known classes, judged and learnt from; fit is None where nothing may be learnt.
        unknown: sets of unknown images.
        words: fingerprint of the words outside the known classes.
        oracle_words: words that name a class of an unknown set are kept; temperature: of energies, on the logits.
        draws: bootstrap samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    known: str
    unknown: list[NamedData]
    fit: str | None
    scores: list[str]
    words: str
    oracle_words: bool = False
    temperature: float = 1.0
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    limit: int | None
    fit_limit: int | None
    draws: int
    seed: int
    device: str
    under_attack: UnderAttack | None = None


OWN = "own"
"""Name of the acceptance score of a model that may refuse, among the scores of a run."""

OWN_SDIS = "own-s-dis"
"""Name of S_DIS on the model's own prototypes and antibodies: its acceptance before thresholds of classes come off."""


# The words of a detect command, checked before anything is loaded

DEFAULT_KNOWN = "emoji"
DEFAULT_UNKNOWN = ("emoji?split=near", "emoji?split=far")
DEFAULT_FIT = "emoji?split=train&copies=2"
NO_FIT = "none"

_TAKEN = ("known", "fit", "adversarial")
_NAMED = re.compile(r"([A-Za-z0-9][\w-]{0,39})=(.+)")
_MOST_DRAWS = 100_000
# Attacked unless the user says which: one that everybody has, the usual CLIP score, and one of the images' cloud.
_ATTACKED = ("mcm", "energy", "mahalanobis")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a command says; see `robustvlm detect --help` for the meaning of each."""

    model: str = "tiny"
    known: str | None = None
    unknown: Sequence[str] = ()
    fit: str | None = None
    scores: str = "all"
    words: Path | None = None
    oracle_words: bool = False
    temperature: float = 1.0
    classes: Path | None = None
    templates: Path | None = None
    tree: Path | None = None
    limit: int | None = None
    fit_limit: int | None = None
    draws: int = 1000
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    under_attack: bool = False
    attack: str = "pgd,apgd-ce:steps=40"
    attack_scores: str | None = None
    norm: str = "Linf"
    eps: str | None = None
    attack_limit: int = 64
    lanes: int = 64

    def checked(self) -> Settings:
        """Return the settings if they make sense on their own; raise a UserError that says what does not."""
        for name, number, least in (
            ("--limit", self.limit, 2),
            ("--fit-limit", self.fit_limit, 2),
            ("--draws", self.draws, 100),
            ("--seed", self.seed, 0),
            ("--batch-size", self.batch_size, 1),
            ("--attack-limit", self.attack_limit, 2),
            ("--lanes", self.lanes, 1),
        ):
            if number is not None and number < least:
                raise UserError(f"{name} must be at least {least}, got {number}")
        if self.draws > _MOST_DRAWS:
            raise UserError(f"--draws must be at most {_MOST_DRAWS:,} bootstrap samples, got {self.draws:,}")
        self.catalogue()
        require_temperature(self.temperature)
        if self.known is not None and not self.unknown:
            raise UserError("unknown images are needed beside --id: pass --ood DATA, once for each set of them")
        if self.known is None and self.unknown:
            raise UserError("--ood says which images are unknown; pass --id DATA too, the images of known classes")
        if self.attack_scores is not None and not self.under_attack:
            raise UserError("--attack-scores is for --under-attack: pass both")
        if self.under_attack:
            self.attacks()
            self.threat()
            self.attacked_names(may_refuse=True)
        self.unknown_sets()
        return self

    def catalogue(self) -> tuple[str, ...]:
        """Return the scores of the catalogue that are asked for; those of the model are shown wherever it has any."""
        names = [part.strip() for part in self.scores.split(",")]
        rest = [name for name in names if name not in (OWN, OWN_SDIS)]
        return parse_scores(",".join(rest)) if rest else ()

    @property
    def asks_own(self) -> bool:
        """Whether a score of the model itself is asked for by name."""
        return any(part.strip() in (OWN, OWN_SDIS) for part in self.scores.split(","))

    @property
    def known_spec(self) -> str:
        """The data of known classes."""
        return DEFAULT_KNOWN if self.known is None else self.known

    @property
    def fit_spec(self) -> str | None:
        """The images to learn from; None for none. The bundled data brings its own."""
        if self.fit is None:
            return DEFAULT_FIT if self.known is None else None
        return None if self.fit == NO_FIT else self.fit

    def unknown_sets(self) -> list[NamedData]:
        """Return the sets of unknown images with distinct names: as given, `NAME=SPEC`, or made from the spec."""
        found: list[NamedData] = []
        for text in DEFAULT_UNKNOWN if self.known is None else self.unknown:
            match = _NAMED.fullmatch(text)
            name, spec = match.groups() if match else (_short_name(text), text)
            parse_spec(spec)
            if name in _TAKEN:
                raise UserError(f"a set of unknown images cannot be called '{name}': name it, as --ood other={spec}")
            if name in [known.name for known in found]:
                raise UserError(f"two sets of unknown images are called '{name}': name them, as --ood NAME={spec}")
            found.append(NamedData(name=name, spec=spec))
        return found

    def attacks(self) -> list[LaneAttack]:
        """Return the attacks under which scores are judged."""
        found = []
        for attack in parse_attacks(self.attack):
            if not isinstance(attack, LaneAttack):
                raise UserError(
                    f"scores are attacked by our own attacks only, got '{attack.name}': pass for example pgd"
                )
            found.append(attack)
        return found

    def threat(self) -> tuple[ThreatModel, str]:
        """Return the ball of the attacks, and its radius as it was written."""
        norm = parse_norm(self.norm)
        radii = parse_eps(self.eps if self.eps is not None else DEFAULT_EPS[norm])
        if len(radii) != 1:
            raise UserError(f"--eps takes one radius here, got '{self.eps}'")
        return ThreatModel(norm, radii[0][1]), radii[0][0]

    def attacked_names(self, *, may_refuse: bool) -> list[str]:
        """Return the scores to attack; a model that may refuse has its own score attacked first."""
        own = [OWN] if may_refuse else []
        if self.attack_scores is None:
            return own + [name for name in _ATTACKED if name in self.catalogue()]
        wanted = [part.strip() for part in self.attack_scores.split(",")]
        for name in wanted:
            catalogue = self.catalogue()
            if name not in (*SCORES, *catalogue, OWN, OWN_SDIS) and not names_own(name):
                raise UserError(f"unknown score '{name}' in --attack-scores: {nearest(name, [*SCORES, OWN])}")
            if name not in (*catalogue, OWN, OWN_SDIS):
                raise UserError(f"the score '{name}' is to be attacked and not in --scores: add it there")
            if name == OWN and not may_refuse:
                raise UserError("the model never refuses, so it has no acceptance of its own to attack: leave out own")
        return list(dict.fromkeys(wanted))

    def under_attack_config(self, *, may_refuse: bool) -> UnderAttack | None:
        """Return what the manifest says of the attacks; None without them."""
        if not self.under_attack:
            return None
        threat, text = self.threat()
        return UnderAttack(
            scores=self.attacked_names(may_refuse=may_refuse),
            attack=[attack.name for attack in self.attacks()],
            norm=threat.norm,
            eps=threat.eps,
            eps_text=text,
            limit=self.attack_limit,
            lanes=self.lanes,
        )


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


# What a detect run reports while it works; the command line draws it, a library user may ignore it


class DetectObserver:
    """Receives progress and does nothing with it; override what you want to show."""

    def begin(self, title: str, total: int | None, done: int) -> None:
        """A stage begins: `total` images (None: not known), `done` of them known from an earlier session."""

    def advance(self, images: int) -> None:
        """So many more images of the stage are finished."""
