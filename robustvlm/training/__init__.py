"""The training engine: one loop for whatever is trained, reproducible to the bit and safe against kills.

    trainer = Trainer(task, data, config)          # a Task, a TrainingData, a TrainingConfig
    history = trainer.fit(folder)                   # goes on from the checkpoint in `folder`, if there is one

* A `Task` says what the loss of a batch is, and measures the present weights when it is validated.
* `TrainingImages` deals any data source into batches: the order is a permutation by (seed, epoch), augmentation of an
  image is drawn by (seed, epoch, id), ranks and accumulated parts take slices of the same global batch.
* `Trainer.fit` runs AdamW under a cosine schedule, with autocast, moving average, DDP under `torchrun`, atomic
  checkpoints in mid-epoch, and warnings when training goes wrong.
"""

from robustvlm.training.distributed import gathered
from robustvlm.training.history import Estimate, Validation, Warned
from robustvlm.training.images import TrainingData, TrainingImages, ids_of, parse_augmentation
from robustvlm.training.task import Draws, Measure, Task, TrainingConfig, TrainingObserver
from robustvlm.training.trainer import Trainer
from robustvlm.training.validation import LabelledImages, RobustValidation

__all__ = [
    "Draws", "Estimate", "LabelledImages", "Measure", "RobustValidation", "Task", "Trainer", "TrainingConfig",
    "TrainingData", "TrainingImages", "TrainingObserver", "Validation", "Warned", "gathered", "ids_of",
    "parse_augmentation",
]  # fmt: skip
