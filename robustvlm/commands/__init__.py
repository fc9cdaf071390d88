"""The commands that make runs, one a file or folder: settings, work, and what is shown of the results."""
