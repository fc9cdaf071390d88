"""Adversarial fine-tuning: what is trained, on which loss, against which inner attack.

    task = finetune_task(vlm, FinetuneSettings(method="tecoa"), class_names=..., templates=..., calibration=pixels)
    Trainer(task, data, config).fit(folder)          # robustvlm.training
    plain_state(vlm)                                 # weights with LoRA and SSF merged in, under the base's own names

* `methods`: the short methods (`tecoa`, `fare`, `simclip`, `clean`), each a `Method` with one abstract function, the
  loss terms of a batch, and the PGD inside training.
* `guided`: those with the original model's class distribution as a guide (`pmg`, `agft`, `ucat`).
* `distill`: with another model as the guide.
* `hierarchical`: the long one, with its `hyperbolic` space and the `hierarchy` of its loss.
* `trainable`: which parameters are trained (`all`, `lora[:RANK]`, `ssf`, `last:N`) and how they are merged back.
"""

from robustvlm.defenses.finetune.hierarchy import HierarchicalOptions
from robustvlm.defenses.finetune.methods import InnerAttack, Method
from robustvlm.defenses.finetune.task import METHODS, FinetuneSettings, FinetuneTask, find_method, finetune_task
from robustvlm.defenses.finetune.trainable import plain_state

__all__ = [
    "METHODS", "FinetuneSettings", "FinetuneTask", "HierarchicalOptions", "InnerAttack", "Method", "find_method",
    "finetune_task", "plain_state",
]  # fmt: skip
