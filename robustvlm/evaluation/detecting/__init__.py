"""`robustvlm detect`: how scores tell known from unknown images, clean and under attack."""
