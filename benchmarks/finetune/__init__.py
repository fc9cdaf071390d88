"""Fine-tuning methods side by side: python -m benchmarks.finetune --help."""
