"""Everything that a training consists of between two steps, and its way to disk and back."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustvlm.core.files import parse_json, replacing, require_regular
from robustvlm.errors import UserError, setting
from robustvlm.models.weights import stored_weights
from robustvlm.training.history import History
from robustvlm.training.task import TrainingConfig

# Checkpoints: named tensors and a JSON text in one safetensors file, which appears whole or not at all

LAST = "last.safetensors"
BEST = "best.safetensors"
_FACTS = "robustvlm"
_OVER = f"start over with {setting('fresh', True)}"


def write_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write groups of named tensors, and facts that are plain JSON, atomically.

    Example:
        >>> import tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "last.safetensors"
        >>> write_checkpoint(file, {"weights": {"w": torch.ones(2)}}, {"step": 3})
        >>> read_checkpoint(file)
        ({'weights': {'w': tensor([1., 1.])}}, {'step': 3})
    """
    flat = stored_weights({f"{part}/{name}": t for part, group in parts.items() for name, t in group.items()})
    if not path.parent.is_dir():
        raise UserError(f"the run's folder was deleted or moved while it was at work: '{path.parent}' is gone")
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata={"format": "pt", _FACTS: json.dumps(facts)})


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return what `write_checkpoint` was given; raise UserError for a file that is damaged or something else."""
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        require_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = dict(parse_json((file.metadata() or {})[_FACTS]))
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint '{path}' is damaged ({error}): {_OVER}") from error
    return parts, facts


# What a run changes: the trained parameters and the buffers of a module, their optimiser and their average

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Weights:
    """The parameters of a module that require gradients, by name, and its buffers that are stored.

    Raises UserError when nothing is to be trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError(
                f"nothing is to be trained: every parameter is frozen; choose another {setting('trainable')}"
            )
        stored = module.state_dict(keep_vars=True).keys()
        self.buffers = {name: b for name, b in module.named_buffers() if name in stored and b.numel()}

    def values(self) -> dict[str, Tensor]:
        """Return all values by name, as they stand."""
        both: dict[str, Tensor] = {**self.parameters, **self.buffers}
        return {name: value.detach() for name, value in both.items()}

    def state(self) -> dict[str, Tensor]:
        """Return copies of all values, by name."""
        return {name: value.clone() for name, value in self.values().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values of `state` in place; raise UserError where names or shapes are others."""
        own: dict[str, Tensor] = {**self.parameters, **self.buffers}
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise UserError(f"the checkpoint is of another model or trains other parts: {_OVER}")
        for name, value in own.items():
            value.copy_(state[name])

    @contextmanager
    def lent(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Put other values in place for a while; None leaves the own ones."""
        if state is None:
            yield
            return
        own = self.state()
        self.load(state)
        try:
            yield
        finally:
            self.load(own)


class Average:
    """An exponential moving average of weights, which forgets faster in the first steps.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the start does not weigh on short runs.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.values = weights.state()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in {**self.weights.parameters, **self.weights.buffers}.items():
            if value.is_floating_point():
                self.values[name].lerp_(value, share)
            else:
                self.values[name].copy_(value)


def make_optimizer(weights: Weights, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that does not decay vectors and single numbers."""
    groups = [
        {"params": [p for p in weights.parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in weights.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def moments(weights: Weights, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors; parameters that never had a gradient have none."""
    return {
        f"{name}|{key}": optimizer.state[p][key].detach().cpu()
        for name, p in weights.parameters.items()
        if optimizer.state.get(p)
        for key in _MOMENTS
    }


def load_moments(weights: Weights, optimizer: torch.optim.AdamW, state: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave."""
    for name, p in weights.parameters.items():
        if f"{name}|step" in state:
            # AdamW counts steps on the CPU, and keeps the moments with the parameter.
            found = {key: state[f"{name}|{key}"].clone() for key in _MOMENTS}
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}


# Everything that a training consists of between two steps, and its way to disk and back

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
        parts = {"weights": self.weights.values(), "optimizer": moments(self.weights, self.optimizer)}
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
            raise UserError(f"the checkpoint '{path}' is another run's: put this run's back, or {_OVER}")
        wanted = self._conditions()
        other = [key for key, value in wanted.items() if facts.get(key) != value]
        if other:
            raise UserError(f"the checkpoint '{path}' was made with another {' and '.join(other)}: {_OVER}")
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
        write_checkpoint(folder / BEST, {"weights": self.kept or self.weights.values()}, facts)

    def load_kept(self, folder: Path) -> None:
        """Put the values of the best validation into the module; without one, those of the last step.

        Raises UserError when the file of the best values is gone, or of another step.
        """
        if self.history.best_step is not None:
            best = self._best_of(folder)
            if best is None:
                raise UserError(
                    f"'{folder / BEST}' does not hold the weights of step {self.history.best_step}, the best ones: "
                    f"{_OVER}"
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
