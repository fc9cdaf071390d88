"""The command line: one file per command; parsing, progress and printing, nothing else."""
