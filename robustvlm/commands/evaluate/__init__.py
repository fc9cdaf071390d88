"""`robustvlm evaluate`: accuracy, calibration and top-k of a model without an attack."""
