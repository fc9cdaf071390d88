"""`robustvlm purify`: from the words of the command to a trained purifier and mapper, as a run folder."""
