"""Evaluating models on data: clean measures and attack runs."""
