"""Everything that a training consists of between two steps, and its way to disk and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustvlm.errors import UserError
from robustvlm.training.checkpoint import BEST, LAST, read_checkpoint, write_checkpoint
from robustvlm.training.config import TrainingConfig
from robustvlm.training.history import History
from robustvlm.training.weights import Average, Weights, load_moments, make_optimizer, moments

_FREE = ("checkpoint_every",)
"""Settings that do not touch the weights, and may change between sessions."""


@dataclass
class Pending:
    """What belongs to the next entry of the history: sums of terms and gradient norms over so many steps."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    norms: float = 0.0
    counted: int = 0


class TrainingState:
    """Weights, optimiser, moving average, the number of steps made, and the history.

    There is no state of random generators: every draw is a function of the seed, the step and the image.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, *, images: int, run: str | None = None) -> None:
        self.config, self.images, self.run = config, images, run
        self.weights = Weights(module)
        self.optimizer = make_optimizer(self.weights, config)
        self.average = Average(self.weights, config.ema) if config.ema is not None else None
        self.history = History()
        self.step = 0
        self.pending = Pending()

    @property
    def kept(self) -> Mapping[str, Tensor] | None:
        """The values to validate and keep where they are not the present weights: those of the moving average."""
        return self.average.values if self.average is not None else None

    def save(self, folder: Path) -> None:
        """Write the checkpoint that training goes on from."""
        parts = {"weights": self.weights.state(), "optimizer": moments(self.weights, self.optimizer)}
        if self.average is not None:
            parts["average"] = self.average.values
        if self.pending.sums:
            parts["pending"] = self.pending.sums
        facts: dict[str, Any] = {"pending": [self.pending.norms, self.pending.counted]}
        facts |= {
            "run": self.run,
            "step": self.step,
            "history": self.history.model_dump(mode="json"),
        } | self._conditions()
        write_checkpoint(folder / LAST, parts, facts)

    def load(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`; return False if there is none.

        Raises UserError when it was made under other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LAST
        if not path.exists():
            return False
        parts, facts = read_checkpoint(path)
        if facts.get("run") != self.run:
            raise UserError(
                f"the checkpoint '{path}' is another run's: put this run's back, or start over with --fresh"
            )
        wanted = self._conditions()
        other = [key for key, value in wanted.items() if facts.get(key) != value]
        if other:
            raise UserError(
                f"the checkpoint '{path}' was made with another {' and '.join(other)}: start over with --fresh"
            )
        self.weights.load(parts["weights"])
        load_moments(self.weights, self.optimizer, parts.get("optimizer", {}))
        if self.average is not None:
            self.average.values = {
                name: parts["average"][name].to(value.device) for name, value in self.average.values.items()
            }
        self.history = History.model_validate(facts["history"])
        self.step = int(facts["step"])
        self.pending = Pending(dict(parts.get("pending", {})), *facts.get("pending", (0.0, 0)))
        if self.history.best_step is not None and self._best_of(folder) is None:
            # Killed between the two files: what was kept is not what this history speaks of, so it is no candidate.
            self.history.best_step = None
        return True

    def save_best(self, folder: Path) -> None:
        """Write the values to keep as the best so far."""
        best = self.history.best()
        facts = {"step": self.step, "validation": best.model_dump(mode="json") if best else None, "run": self.run}
        write_checkpoint(folder / BEST, {"weights": self.kept or self.weights.state()}, facts)

    def load_kept(self, folder: Path) -> None:
        """Put the values of the best validation into the module; without one, those of the last step.

        Raises UserError when the file of the best values is gone, or of another step.
        """
        if self.history.best_step is not None:
            best = self._best_of(folder)
            if best is None:
                raise UserError(
                    f"'{folder / BEST}' does not hold the weights of step {self.history.best_step}, the best ones: "
                    "start over with --fresh"
                )
            self.weights.load(best)
        elif self.kept is not None:
            self.weights.load(self.kept)

    def _best_of(self, folder: Path) -> Mapping[str, Tensor] | None:
        """Return the stored values of the best validation that the history names, None if others or none are there."""
        if not (folder / BEST).exists():
            return None
        parts, facts = read_checkpoint(folder / BEST)
        same = facts.get("run") == self.run and facts.get("step") == self.history.best_step
        return parts["weights"] if same else None

    def _conditions(self) -> dict[str, Any]:
        settings = {key: value for key, value in asdict(self.config).items() if key not in _FREE}
        return {"settings": settings | {"betas": list(self.config.betas)}, "number of images": self.images}
