"""Numbers that several layers have to agree on, each said once."""

LAMBDA_INF = 0.5
"""Weight of the nearest antibody in S_DIS, in `detect`, `immunize` and `certify` alike. The paper leaves it open; at 1
the score loses known images that antibodies lie near to."""
