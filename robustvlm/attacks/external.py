"""Names of published attacks, `torchattacks:NAME[:key=value...]` and `autoattack[:VERSION]`, and what each can do."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from robustvlm.attacks.base import ATTACKS
from robustvlm.attacks.goals import Goal, Misclassify
from robustvlm.attacks.threat import ThreatModel
from robustvlm.errors import UserError, nearest

# What the published packages offer for a ball of given norm and radius, and what they need

LINF, BOTH = ("Linf",), ("Linf", "L2")

# Attacks of torchattacks that keep inside a ball of radius eps, with the norms that they know.
TORCHATTACKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM", "TIFGSM", "Jitter",
            "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA", "PIFGSM", "PIFGSMPP",
        ),
        LINF,
    ),
    "PGDL2": ("L2",),
    "PGDRSL2": ("L2",),
    **dict.fromkeys(("APGD", "APGDT", "FAB", "Square", "AutoAttack"), BOTH),
}  # fmt: skip

_SMALLEST = "it looks for the smallest change instead of keeping inside eps: take fab-t"
_SPARSE = "it changes few pixels by any amount, which neither Linf nor L2 bounds"
_OTHER = "it is no attack inside a ball"

# Why the other names of torchattacks are refused.
UNBOUNDED: dict[str, str] = {
    **dict.fromkeys(("CW", "DeepFool", "EADEN", "EADL1"), _SMALLEST),
    **dict.fromkeys(("SparseFool", "OnePixel", "Pixle", "JSMA"), _SPARSE),
    **dict.fromkeys(("VANILA", "GN", "MultiAttack", "LGV"), _OTHER),
}

# What the run decides, so that no option may.
DECIDED = ("model", "eps", "max_epsilon", "norm", "seed", "verbose", "n_classes")

VERSIONS = ("standard", "plus", "rand")
SINGLE = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Options of autoattack: steps of APGD and FAB, restarts, target classes, queries of Square.
AUTOATTACK_OPTIONS = ("steps", "restarts", "targets", "queries")

_DLR = "its DLR loss compares the first and the third logit"
_DLR_TARGETED = "its targeted DLR loss compares the first, the third and the fourth logit"


def fewest_classes(package: str, kind: str, options: dict[str, object]) -> tuple[int, str]:
    """Return how many classes an attack of a package needs at least, and why.

    Example:
        >>> fewest_classes("pyautoattack", "standard", {})
        (4, 'its targeted DLR loss compares the first, the third and the fourth logit')
    """
    targeted = {"pyautoattack": ("standard", "plus", "apgd-t"), "torchattacks": ("APGDT",)}[package]
    dlr = {"pyautoattack": ("rand", "apgd-dlr"), "torchattacks": ()}[package]
    if kind == "AutoAttack":
        return (3, _DLR) if options.get("version") == "rand" else (4, _DLR_TARGETED)
    if kind in targeted:
        return 4, _DLR_TARGETED
    if kind in dlr or options.get("loss") == "dlr":
        return 3, _DLR
    return 2, ""


# Names of published attacks: `torchattacks:NAME[:key=value...]` and `autoattack[:VERSION][:key=value...]`

_MOST = 100_000


@dataclass(frozen=True)
class ExternalAttack:
    """An attack of a published package, as asked for.

    Args:
        name: as written on the command line.
        package: "torchattacks" or "pyautoattack".
        kind: class of torchattacks; version or single attack of AutoAttack.
        options: settings that differ from the package's own, as (name, value) pairs.

    Example:
        >>> parse_external("autoattack:square:queries=100").kind
        'square'
    """

    name: str
    package: str
    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def uses_gradient(self) -> bool:
        """Whether the attack asks for gradients; Square and SPSA only ask for answers."""
        return self.kind.lower() not in ("square", "spsa")

    @property
    def settings(self) -> dict[str, Any]:
        """The options by name."""
        return dict(self.options)


def parse_external(text: str, *, steps: int | None = None, restarts: int | None = None) -> ExternalAttack:
    """Return the attack of a name such as `torchattacks:PGD:steps=20:alpha=2/255` or `autoattack:standard`.

    `steps` and `restarts` apply where the name does not state its own and the attack has such a setting.

    Raises:
        UserError: unknown name or option, a value that does not fit, a package that is not installed.

    Example:
        >>> parse_external("torchattacks:PGD:steps=20").options
        (('steps', 20),)
    """
    text = text.strip()
    prefix, *parts = text.split(":")
    common = {"steps": steps, "restarts": restarts}
    given = {key: value for key, value in common.items() if value is not None}
    if prefix.lower() == "torchattacks":
        return _torchattacks(text, parts, given)
    return _autoattack(text, parts, given)


def _torchattacks(text: str, parts: list[str], given: Mapping[str, int]) -> ExternalAttack:
    if not parts or not parts[0]:
        raise UserError(f"'{text}' names no attack: expected torchattacks:NAME, for example torchattacks:PGD")
    known = {name.lower(): name for name in (*TORCHATTACKS, *UNBOUNDED)}
    kind = known.get(parts[0].lower())
    if kind is None:
        raise UserError(f"unknown attack '{parts[0]}' of torchattacks: {nearest(parts[0], TORCHATTACKS)}")
    if kind in UNBOUNDED:
        raise UserError(f"'{text}' cannot be run: {UNBOUNDED[kind]}")
    defaults = _torchattacks_defaults(kind)
    renamed = {("n_restarts" if key == "restarts" else key): value for key, value in given.items()}
    options = {key: value for key, value in renamed.items() if key in defaults}
    for part in parts[1:]:
        key, value = _split(text, part, tuple(defaults))
        options[key] = _read(text, part, value, defaults[key])
    return ExternalAttack(text, "torchattacks", kind, tuple(options.items()))


def _torchattacks_defaults(kind: str) -> dict[str, Any]:
    """Return the settings of a class that a user may change, with their defaults."""
    parameters = inspect.signature(getattr(package("torchattacks"), kind)).parameters
    return {name: item.default for name, item in parameters.items() if name not in DECIDED}


def _autoattack(text: str, parts: list[str], given: Mapping[str, int]) -> ExternalAttack:
    package("pyautoattack")
    kind = "standard"
    if parts and "=" not in parts[0]:
        kind = parts.pop(0).lower()
        if kind not in (*VERSIONS, *SINGLE):
            raise UserError(f"unknown version '{kind}' of autoattack: {nearest(kind, (*VERSIONS, *SINGLE))}")
    options = dict(given)
    for part in parts:
        key, value = _split(text, part, AUTOATTACK_OPTIONS)
        options[key] = _read(text, part, value, 1)
    for key, number in options.items():
        if number < 1:
            raise UserError(f"attack '{text}': {key} must be at least 1, got {number}")
    return ExternalAttack(text, "pyautoattack", kind, tuple(options.items()))


def _split(text: str, part: str, known: tuple[str, ...]) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if key in ("eps", "max_epsilon", "norm"):
        raise UserError(f"'{part}' in '{text}': the ball comes from --norm and --eps, leave it out here")
    if not equals or key not in known:
        raise UserError(f"unknown option '{part}' of '{text}': expected key=value with key one of {', '.join(known)}")
    return key, value


def _read(text: str, part: str, value: str, default: Any) -> Any:
    """Return a value in the type of the setting's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, int):
            return _within(text, part, int(value) if float(value) == int(float(value)) else float(value))
        if isinstance(default, float):
            return _within(text, part, float(Fraction(value.replace(" ", ""))))
    except (ValueError, KeyError, ZeroDivisionError, OverflowError):
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise UserError(f"option '{part}' of '{text}': expected {kind}, got '{value}'") from None
    return value


def _within(text: str, part: str, number: float) -> float:
    """Refuse numbers with which a package would not end in a lifetime, or would begin with nothing."""
    if not 0 <= number <= _MOST:
        raise UserError(f"option '{part}' of '{text}': expected a number from 0 to {_MOST:,}")
    return number


def package(name: str) -> Any:
    """Return the imported package, or raise a UserError with the command that installs it."""
    try:
        if name == "torchattacks":
            import torchattacks

            return torchattacks
        import pyautoattack

        return pyautoattack
    except ImportError as error:
        raise UserError(f"this needs the package '{name}' ({error}): pip install {_INSTALLED_BY[name]}") from error


_INSTALLED_BY = {"torchattacks": "'robustvlm[external]'", "pyautoattack": "pyautoattack"}


def require_norm(attack: ExternalAttack, norm: str) -> None:
    """Raise a UserError unless the attack knows balls of this norm.

    Example:
        >>> require_norm(parse_external("torchattacks:PGD"), "L2")
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'torchattacks:PGD' knows only Linf balls: take --norm Linf, or ...
    """
    norms = TORCHATTACKS[attack.kind] if attack.package == "torchattacks" else BOTH
    if norm not in norms:
        others = ", ".join(name for name, known in TORCHATTACKS.items() if norm in known and norms != known)
        raise UserError(
            f"'{attack.name}' knows only {norms[0]} balls: take --norm {norms[0]}, or for {norm} one of {others}"
        )


def require_fit(attack: ExternalAttack, threat: ThreatModel, *, n_classes: int, goal: Goal) -> None:
    """Raise a UserError unless the attack knows the norm, the number of classes and the goal.

    Example:
        >>> require_fit(parse_external("autoattack"), ThreatModel("L2", 0.5), n_classes=2, goal=Misclassify())
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'autoattack' needs at least 4 classes, here are 2 ...
    """
    if type(goal) is not Misclassify:  # a goal of the user's may build on it and mean something else
        about = "of a model that may refuse" if goal.spec == Misclassify.spec else f"'{goal.spec}'"
        raise UserError(
            f"'{attack.name}' knows only the goal misclassify of a model that never refuses, not {about}: "
            f"take one of our own ({', '.join(ATTACKS)})"
        )
    require_norm(attack, threat.norm)
    fewest, why = fewest_classes(attack.package, attack.kind, attack.settings)
    if n_classes < fewest:
        raise UserError(
            f"'{attack.name}' needs at least {fewest} classes, here are {n_classes} ({why}): take our own apgd-ce, "
            "apgd-t, fab-t and square, which say in the report what takes the loss's place"
        )
