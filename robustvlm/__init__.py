"""robustvlm: attack, certify and defend CLIP-like vision-language models.

The library's face: every name below is loaded when it is first asked for, so that the import itself costs nothing.

    import robustvlm as rv

    model = rv.load_classifier("tiny", "emoji")
    found = rv.perturb(model, images, labels, attack="apgd-ce,apgd-t", eps="2/255")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustvlm.attacks.base import ATTACKS as ATTACKS
    from robustvlm.attacks.perturb import AutoAttack as AutoAttack
    from robustvlm.attacks.perturb import Perturbed as Perturbed
    from robustvlm.attacks.perturb import perturb as perturb
    from robustvlm.attacks.threat import ThreatModel as ThreatModel
    from robustvlm.core.callable_module import CallableModule
    from robustvlm.data.specs import open_data as open_data
    from robustvlm.defenses.load import load_classifier as load_classifier
    from robustvlm.defenses.load import load_model as load_model
    from robustvlm.defenses.votes import ABSTAIN as ABSTAIN
    from robustvlm.defenses.votes import Smoothed as Smoothed
    from robustvlm.defenses.votes import certify_tensors as certify_tensors
    from robustvlm.detect.catalog import SCORES as SCORES
    from robustvlm.errors import UserError as UserError
    from robustvlm.runs.run import FinishedRun

    __version__: str
    # Packages that are verbs as well: to a type checker their content is of any type.
    certify: CallableModule[FinishedRun[Any]]
    detect: CallableModule[FinishedRun[Any]]

# Where each public name lives; a module stands for itself. A new name is a line here and one above.
_HOME = {
    "ABSTAIN": "robustvlm.defenses.votes",
    "ATTACKS": "robustvlm.attacks.catalog",
    "AutoAttack": "robustvlm.attacks.perturb",
    "Perturbed": "robustvlm.attacks.perturb",
    "SCORES": "robustvlm.detect.catalog",
    "Smoothed": "robustvlm.defenses.votes",
    "ThreatModel": "robustvlm.attacks.threat",
    "UserError": "robustvlm.errors",
    "certify": "robustvlm.certify",
    "certify_tensors": "robustvlm.defenses.votes",
    "detect": "robustvlm.detect",
    "load_classifier": "robustvlm.defenses.load",
    "load_model": "robustvlm.defenses.load",
    "open_data": "robustvlm.data.specs",
    "perturb": "robustvlm.attacks.perturb",
}

__all__ = [
    "ABSTAIN",
    "ATTACKS",
    "SCORES",
    "AutoAttack",
    "Perturbed",
    "Smoothed",
    "ThreatModel",
    "UserError",
    "__version__",
    "certify",
    "certify_tensors",
    "detect",
    "load_classifier",
    "load_model",
    "open_data",
    "perturb",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        from importlib import import_module

        home = import_module(_HOME[name])
        value = home if _HOME[name] == f"{__name__}.{name}" else getattr(home, name)
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("robustvlm")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
