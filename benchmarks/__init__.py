"""Measurements, each a command of its own; the results stand in README.md beside this file."""
