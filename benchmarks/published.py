"""The published AutoAttack under observation: what each of its attacks fools, and what it costs."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from torch import Tensor

from benchmarks.common import Counted

_LOGGER = "auto-attack"


@dataclass(frozen=True)
class Part:
    """One attack of the ensemble: rows of the images it was the first to fool, and its cost.

    `forward` and `backward` count images through the model; the part named "checks" holds the program's questions to
    the model and its clean pass.
    """

    name: str
    fooled: list[int]
    forward: int
    backward: int
    seconds: float

    @property
    def passes(self) -> int:
        return self.forward + self.backward


class _Watch(logging.Handler):
    """Listens to the program's log: each attack announces its begin and its end there."""

    def __init__(self, model: Counted, state: Path, done: Callable[[Part], None]) -> None:
        super().__init__(logging.DEBUG)
        self.model, self.state, self.done = model, state, done
        self.known: set[int] | None = None
        self._mark()

    def _mark(self) -> None:
        self.before = (self.model.forward_rows, self.model.backward_rows, time.perf_counter())

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("initial accuracy"):
            self._part("checks")
        elif message.startswith("robust accuracy after "):
            self._part(message.split()[3].rstrip(":").lower())

    def _part(self, name: str) -> None:
        flags = json.loads(self.state.read_text())["_robust_flags"]
        fallen = {row for row, robust in enumerate(flags) if not robust}
        # Images that are wrong when clean have fallen before the first attack, and are no one's success.
        new = sorted(fallen - self.known) if self.known is not None else []
        self.known = fallen
        forward, backward, began = self.before
        self._mark()
        now_forward, now_backward, now = self.before
        self.done(Part(name, new, now_forward - forward, now_backward - backward, now - began))


def watch_autoattack(
    model: Counted,
    pixels: Tensor,
    labels: Tensor,
    *,
    norm: str,
    eps: float,
    seed: int,
    batch_size: int,
    attacks: Sequence[str] = (),
    version: str = "standard",
    done: Callable[[Part], None] | None = None,
    adjust: Callable[[AutoAttack], None] | None = None,
) -> list[Part]:
    """Run the published ensemble on images [N, 3, H, W] and return its parts in order; `done` hears of each at once.

    Args:
        attacks: only these, with the settings that they have in `version`; default: all of the version.
        adjust: may change the program's settings before it starts.
    """
    parts: list[Part] = []
    logger = logging.getLogger(_LOGGER)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"
        program = AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device=pixels.device)
        program.attacks_to_run = list(attacks) or program.attacks_to_run
        if adjust is not None:
            adjust(program)

        def keep(part: Part) -> None:
            parts.append(part)
            if done is not None:
                done(part)

        handler = _Watch(model, state, keep)
        before = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(handler)
        try:
            with torch.random.fork_rng(devices=[]):
                program.run_standard_evaluation(pixels, labels, batch_size=batch_size, state_path=state)
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before
    return parts
