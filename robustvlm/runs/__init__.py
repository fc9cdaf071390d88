"""Runs on disk: manifest, result rows, and the summary made from them."""
