"""The published AutoAttack under observation: what each of its attacks fools, and what it costs."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pyautoattack import AutoAttack

from benchmarks.common import Counted
from benchmarks.duel import Part
from robustvlm.attacks import Job, ThreatModel

_LOGGER = "auto-attack"

# The part that holds the program's questions to the model and its clean pass.
CHECKS = "checks"


class _Watch(logging.Handler):
    """Listens to the program's log: each attack announces its begin and its end there."""

    def __init__(self, model: Counted, state: Path, ids: Sequence[str]) -> None:
        super().__init__(logging.DEBUG)
        self.model, self.state, self.ids = model, state, ids
        self.parts: list[Part] = []
        self.fallen: set[int] = set()
        self._mark()

    def _mark(self) -> None:
        self.before = (self.model.passes, time.perf_counter())

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("initial accuracy"):
            self._part(CHECKS)
        elif message.startswith("robust accuracy after "):
            self._part(message.split()[3].rstrip(":").lower())

    def _part(self, name: str) -> None:
        flags = json.loads(self.state.read_text())["_robust_flags"]
        fallen = {row for row, robust in enumerate(flags) if not robust}
        new = sorted(self.ids[row] for row in fallen - self.fallen)
        attacked = len(self.ids) - len(self.fallen)
        self.fallen = fallen
        passes, began = self.before
        self._mark()
        now_passes, now = self.before
        # Images that are wrong when clean are no one's success.
        self.parts.append(Part(name, attacked, [] if name == CHECKS else new, now_passes - passes, now - began))


def watch_autoattack(
    model: Counted,
    jobs: Sequence[Job],
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    attacks: Sequence[str] = (),
    adjust: Callable[[AutoAttack], None] | None = None,
) -> list[Part]:
    """Run the published ensemble, version standard, and return its parts in order, its own checks first.

    Args:
        attacks: only these, with the settings that they have in the ensemble; default: all.
        adjust: may change the program's settings before it starts.
    """
    device = next(model.parameters()).device
    x = torch.stack([job.pixels for job in jobs]).to(device)
    y = torch.tensor([job.label for job in jobs], device=device)
    logger = logging.getLogger(_LOGGER)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"
        program = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=device)
        program.attacks_to_run = list(attacks) or program.attacks_to_run
        if adjust is not None:
            adjust(program)
        watch = _Watch(model, state, [job.image_id for job in jobs])
        before = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(watch)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                program.run_standard_evaluation(x, y, batch_size=batch_size, state_path=state)
        finally:
            logger.removeHandler(watch)
            logger.level, logger.propagate = before
    return watch.parts


def set_budget(steps: int | None, queries: int | None) -> Callable[[AutoAttack], None]:
    """Return an adjustment to other numbers of steps (APGD, FAB) and queries (Square) than the published ones."""

    def adjust(program: AutoAttack) -> None:
        program.square.n_queries = queries or program.square.n_queries
        if steps is None:
            return
        program.fab.n_iter = steps
        for name in ("apgd", "apgd_targeted"):  # made again: their checkpoints follow from the steps
            old = getattr(program, name)
            kept = {key: getattr(old, key) for key in ("norm", "n_restarts", "eps", "seed", "device", "logger")}
            setattr(program, name, type(old)(old.model, n_iter=steps, eot_iter=old.eot_iter, **kept))

    return adjust
