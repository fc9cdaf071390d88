"""What every layer stands on, from seeds to files; here the numbers that several layers agree on, each said once."""

LAMBDA_INF = 0.5
"""Weight of the nearest antibody in S_DIS, in `detect`, `immunize` and `certify` alike. The paper leaves it open; at 1
the score loses known images that antibodies lie near to."""

N_MAX = 10_000_000
"""Most noisy copies of an image that a certificate may take."""

PLAIN = "l2"
"""The threat that noise is against where none is named (`robustvlm.certify.threats`)."""

MAX_SIGMA, MAX_N0 = 10.0, 1_000_000
"""Largest noise level, in [0, 1] pixels, and most copies that a smoothed model may average over."""

MOST_WORDS = 3
"""Most changed words of prompts that certificates are made for; a run has a column for each number up to its own."""
