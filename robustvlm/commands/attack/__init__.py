"""`robustvlm attack`: how often attacks change what a model says, and how far that number can be believed."""
