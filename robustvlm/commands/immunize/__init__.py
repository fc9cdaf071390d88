"""`robustvlm immunize`: from class names and some images to a model that may refuse."""
