"""The training engine: one loop for whatever is trained, reproducible to the bit and safe against kills.

    trainer = Trainer(task, data, config)          # a Task, a TrainingData, a TrainingConfig
    record = trainer.fit(folder)                    # continues from the checkpoint in `folder`, if there is one

* A `Task` says what the loss of a batch is, and measures the present weights when it is validated.
* `TrainingImages` deals any data source into batches: the order is a permutation by (seed, epoch), augmentation of an
  image is drawn by (seed, epoch, id), ranks and accumulated parts take slices of the same global batch.
* `Trainer.fit` runs AdamW under a cosine schedule, with autocast, moving average, DDP under `torchrun`, atomic
  checkpoints in mid-epoch, and warnings when training goes wrong.
"""

from robustvlm.training.config import TrainingConfig
from robustvlm.training.distributed import gathered, summed
from robustvlm.training.draws import Draws
from robustvlm.training.task import Measure, Task

__all__ = ["Draws", "Measure", "Task", "TrainingConfig", "gathered", "summed"]
