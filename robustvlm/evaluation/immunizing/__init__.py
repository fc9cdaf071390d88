"""Immunize runs: from the words of a command to a folder that is a model which may refuse."""
