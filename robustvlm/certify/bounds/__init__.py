"""Confidence bounds for means and survival functions of [0, 1] scores: fixed-n, anytime-valid and simultaneous."""

from robustvlm.certify.bounds.band import Band, dkw_band, ell_band, index_band
from robustvlm.certify.bounds.betting import BettingState, betting_lower
from robustvlm.certify.bounds.ell import calibrate, crossing_prob
from robustvlm.certify.bounds.fixed import (
    bernstein_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    hoeffding_lower,
    kl_lower,
    kl_lower_mean,
    kl_upper_mean,
    upper,
)
from robustvlm.certify.bounds.sample import ANYTIME_BOUNDS, LOWER_BOUNDS, FixedSample, mean_lower
from robustvlm.certify.bounds.sequential import Decision, SequentialTest

__all__ = [
    "ANYTIME_BOUNDS",
    "LOWER_BOUNDS",
    "Band",
    "BettingState",
    "Decision",
    "FixedSample",
    "SequentialTest",
    "bernstein_lower",
    "betting_lower",
    "calibrate",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "crossing_prob",
    "dkw_band",
    "ell_band",
    "hoeffding_lower",
    "index_band",
    "kl_lower",
    "kl_lower_mean",
    "kl_upper_mean",
    "mean_lower",
    "upper",
]
