"""Certify runs: from the words of a command to a finished folder of certificates."""
