"""robustvlm: attack, certify and defend CLIP-like vision-language models.

The library's face: every name below is loaded when it is first asked for, so that the import itself costs nothing.

    import robustvlm as rv

    model = rv.load_classifier("tiny", "emoji")
    found = rv.perturb(model, images, labels, attack="apgd-ce,apgd-t", eps="2/255")
"""

from typing import Any

# Where each public name lives; a module stands for itself. `python tools/library_stub.py` writes their types.
_HOME = {
    "ABSTAIN": "robustvlm.defenses.votes",
    "ATTACKS": "robustvlm.attacks.base",
    "AutoAttack": "robustvlm.attacks.perturb",
    "Perturbed": "robustvlm.attacks.perturb",
    "SCORES": "robustvlm.detect.catalog",
    "Smoothed": "robustvlm.defenses.votes",
    "ThreatModel": "robustvlm.attacks.threat",
    "UserError": "robustvlm.errors",
    "attack": "robustvlm.commands.attack",
    "build": "robustvlm.commands.assemble",
    "certify": "robustvlm.certify",
    "certify_tensors": "robustvlm.defenses.votes",
    "compare": "robustvlm.commands.attack.compare",
    "detect": "robustvlm.detect",
    "evaluate": "robustvlm.commands.evaluate",
    "export": "robustvlm.commands.export",
    "finetune": "robustvlm.commands.finetune",
    "immunize": "robustvlm.commands.immunize",
    "judge": "robustvlm.commands.judge",
    "load_classifier": "robustvlm.defenses.load",
    "load_model": "robustvlm.defenses.load",
    "open_data": "robustvlm.data.specs",
    "open_run": "robustvlm.commands",
    "perturb": "robustvlm.attacks.perturb",
    "predict": "robustvlm.commands.predict",
    "purify": "robustvlm.commands.purify",
    "soup": "robustvlm.commands.soup",
    "tune_prompts": "robustvlm.commands.prompts",
}

__all__ = ["__version__", *_HOME]


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
