"""`robustvlm certify`: radii inside which no attack can do certain things to a smoothed model."""
