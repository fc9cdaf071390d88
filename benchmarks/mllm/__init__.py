"""What attacks do to the words of the bundled multimodal model, plain and smoothed."""
