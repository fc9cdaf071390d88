"""`robustvlm finetune`: adversarial fine-tuning of a model's vision tower."""
