"""Training a task on images: the one public call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from robustvlm.core.ranks import Ranks
from robustvlm.runs.files import named_disk_errors
from robustvlm.training.config import TrainingConfig
from robustvlm.training.data import TrainingData
from robustvlm.training.distributed import process_group
from robustvlm.training.history import History
from robustvlm.training.observer import TrainingObserver
from robustvlm.training.session import Session
from robustvlm.training.state import TrainingState
from robustvlm.training.task import Measure, Task


class Trainer:
    """Trains the module of a task; killed at any moment, the same call goes on and ends with the same weights.

    On the CPU a resumed run equals a straight one bit for bit; several ranks equal one up to the order of sums.

    Args:
        task: what is trained, on its device; data: the images; config: how.
        validation: measures beside those of the task, called under the weights that would be kept.
        best_by: the measure to keep the best weights by; default: the task's.
        ranks: the processes of the job; observer: told of the progress, on rank 0.

    Example:
        >>> import tempfile
        >>> from robustvlm.data import open_data
        >>> from robustvlm.training import TrainingImages
        >>> class Brightness(Task):
        ...     def losses(self, pixels, labels, step, draws):
        ...         return {"loss": (self.module(pixels.flatten(1))[:, 0] - pixels.mean((1, 2, 3))).square().mean()}
        >>> images = TrainingImages(open_data("emoji?split=train&copies=1"), size=8, seed=0, limit=64)
        >>> task = Brightness(torch.nn.Linear(192, 1))
        >>> config = TrainingConfig(steps=30, batch_size=32, lr=0.01)
        >>> history = Trainer(task, images, config).fit(Path(tempfile.mkdtemp()))
        >>> history.steps[-1].terms["loss"] < history.steps[0].terms["loss"]
        True
    """

    def __init__(
        self,
        task: Task,
        data: TrainingData,
        config: TrainingConfig,
        *,
        validation: Callable[[], Mapping[str, Measure]] | None = None,
        best_by: str | None = None,
        ranks: Ranks | None = None,
        observer: TrainingObserver | None = None,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.validation, self.best_by = validation, best_by or task.best_by
        self.ranks = ranks or Ranks()
        self.observer = (observer if self.ranks.leader else None) or TrainingObserver()
        self.total = config.total_steps(len(data))
        self.device = next(task.module.parameters()).device
        self.part = config.part_size(self.ranks.size)

    def fit(self, folder: Path, *, run: str | None = None) -> History:
        """Train to the last step, with checkpoints in `folder`; leave the best weights in the module.

        Args:
            run: identity of the run, which the checkpoints carry; those of another one are refused.

        Raises:
            UserError: divergence, a checkpoint made under other settings, no memory, a full disk, a failed peer.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with named_disk_errors(folder), process_group(self.ranks, self.device), torch.random.fork_rng(devices):
            state = TrainingState(self.task.module, self.config, images=len(self.data), run=run)
            state.load(folder)
            Session(self, state, folder).run()
            self.ranks.barrier()
            state.load_kept(folder)
            self.task.module.eval()
        return state.history
