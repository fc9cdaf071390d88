"""The immunised classifier beside training-free scores, with its parts taken away one at a time (README.md)."""
