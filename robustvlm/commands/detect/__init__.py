"""`robustvlm detect`: how well scores tell known from unknown images, clean and under attack."""
