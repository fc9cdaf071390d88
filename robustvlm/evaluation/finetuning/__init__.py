"""Fine-tuning runs: from a command to a run folder that is a model."""

from robustvlm.evaluation.finetuning.prepared import PreparedFinetune
from robustvlm.evaluation.finetuning.setup import prepare_finetune

__all__ = ["PreparedFinetune", "prepare_finetune"]
