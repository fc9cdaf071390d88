"""Adversarial fine-tuning: what is trained, on which loss, against which inner attack.

    task = finetune_task(vlm, settings, class_names=..., templates=..., forest=..., calibration=pixels)
    Trainer(task, data, config).fit(folder)          # robustvlm.training
    plain_state(vlm)                                 # weights with LoRA and SSF merged in, under the base's own names

* `methods/`: one file per method (`hierarchical`, `tecoa`, `fare`, `pmg`, `simclip`, `clean`), each a
  `Method` with one abstract function, the loss terms of a batch.
* `hyperbolic`, `hierarchy`, `hita`: the mathematics of the hierarchical method.
* `inner_attack`: PGD inside training.
* `trainable/`: which parameters are trained (`all`, `lora[:RANK]`, `ssf`, `last:N`) and how they are merged back.
"""
