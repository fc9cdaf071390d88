"""The command line: parsing, progress and printing, nothing else."""
