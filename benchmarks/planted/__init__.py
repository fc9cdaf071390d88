"""Models with one planted fault each, to see which check of an attack run notices it."""
