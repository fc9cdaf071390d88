"""From the description of a published attack to a function on batches."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustvlm.attacks.external.catalog import VERSIONS
from robustvlm.attacks.external.spec import ExternalAttack, package
from robustvlm.attacks.external.watched import Watched
from robustvlm.attacks.threat import ThreatModel

# (images [B, 3, H, W], labels [B], seed) to points [B, 3, H, W].
Program = Callable[[Tensor, Tensor, int], Tensor]

_TARGETS = 9  # target classes of the published ensembles
_LOGGER = "auto-attack"


def program(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int) -> Program:
    """Return the attack as a function; a call leaves the global random state as it was and prints nothing."""
    make = _torchattacks if attack.package == "torchattacks" else _autoattack

    def run(x: Tensor, y: Tensor, seed: int) -> Tensor:
        cuda = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            points: Tensor = make(attack, model, threat, n_classes, seed)(x, y)
        return points.detach()

    return run


def _torchattacks(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int, seed: int) -> Any:
    kind = getattr(package("torchattacks"), attack.kind)
    known = inspect.signature(kind).parameters
    decided = {
        "eps": threat.eps,
        "max_epsilon": threat.eps,
        "norm": threat.norm,
        "seed": seed,
        "n_classes": min(n_classes, _TARGETS + 1),
    }
    return kind(model, **{key: value for key, value in decided.items() if key in known}, **attack.settings)


def _autoattack(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int, seed: int) -> Any:
    version = attack.kind if attack.kind in VERSIONS else "standard"
    whole = package("pyautoattack").AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=seed, version=version, device=model.anchor.device
    )
    if attack.kind not in VERSIONS:
        whole.attacks_to_run = [attack.kind]
    _set_steps(whole, attack.settings.get("steps"))
    targets = min(attack.settings.get("targets", _TARGETS), n_classes - 1)
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    whole.square.n_queries = attack.settings.get("queries", whole.square.n_queries)
    if "restarts" in attack.settings:
        for part in (whole.apgd, whole.apgd_targeted, whole.fab, whole.square):
            part.n_restarts = attack.settings["restarts"]
    return lambda x, y: whole.run_standard_evaluation(x, y, batch_size=len(x))[0]


def _set_steps(whole: Any, steps: int | None) -> None:
    """Change the number of steps; APGD derives its checkpoints from it when it is made, so it is made again."""
    if steps is None:
        return
    whole.fab.n_iter = steps
    for name in ("apgd", "apgd_targeted"):
        old = getattr(whole, name)
        fields = ("norm", "n_restarts", "eps", "seed", "eot_iter", "device", "logger")
        setattr(whole, name, type(old)(old.model, n_iter=steps, **{field: getattr(old, field) for field in fields}))


class _Warnings(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage().split(" See flags_doc.md")[0])


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Keep what the packages print off the terminal, and yield the list of the warnings that they give."""
    heard: list[str] = []
    logger, handler, trace = logging.getLogger(_LOGGER), _Warnings(heard), sys.gettrace()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield heard
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        sys.settrace(trace)  # pyautoattack takes it away to look for dynamic defences
