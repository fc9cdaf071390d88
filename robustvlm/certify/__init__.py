"""Certified robustness of smoothed features: confidence bounds (`bounds`) and one module per certificate.

Every certificate is a pure function of bounds on the clean image's smoothed feature and of `a = eps / sigma`:

* `fcsb`: the feature-cosine smoothing bound along a fixed direction, as published and corrected (T1);
* `cone`, `vector_np`, `vector_table`: the angle between the smoothed features of clean and attacked image (T2-T4);
* `distribution`, `tangent`, `covariance`: whole distribution, its anytime-valid form, second moments (T5-T7);
* `class_margin`, `class_sequential`, `open_vocabulary`: the class of the mean feature (T8); `vote`: the hard vote;
* `openset`, `openset_rule`, `openset_deployed`: acceptance and rejection;
* `deployed`: what n0 inference samples keep of a certificate (T10);
* `noise`, `sampling`, `engine`: fresh noise, what a claim wants of it, and batches of many images; with the certifiers
  `feature_claim`, `class_claim`, `openset_claim` (fixed n, or stopping as soon as a radius is decided);
* `resize`: what a radius at the model's resolution is worth at the source, for a resize in floating point;
* `limits`: what settings can give at best; `record`: what a certificate must state; `rounding`: print it rounded down.

Radii are in the pixel units of sigma and hold strictly inside, up to floating point. Zero is ABSTAIN.
"""

from robustvlm.certify.bounds import (
    ANYTIME_BOUNDS,
    Band,
    BettingState,
    Decision,
    FixedSample,
    SequentialTest,
    betting_lower,
    clopper_pearson_lower,
    dkw_band,
    ell_band,
    hoeffding_lower,
    index_band,
    mean_lower,
)
from robustvlm.certify.class_claim import ClassAtRadius, ClassRadius, VocabularyRadius, VoteAtRadius, VoteRadius
from robustvlm.certify.class_margin import class_angle, class_margin_radius, mean_margin_radius, rival_normals
from robustvlm.certify.class_sequential import ClassTest
from robustvlm.certify.cone import cone_cos, cone_radius, drift, norm_lower, norm_upper, side_upper
from robustvlm.certify.covariance import Sideways, direction_cos, direction_radius, hcr_drift, sideways
from robustvlm.certify.deployed import (
    class_margin_needed,
    deployed_cos,
    deployed_from_angle,
    deployed_inner,
    predict,
    vote_share_needed,
)
from robustvlm.certify.deployed_feature import deployed_feature_cos, deployed_feature_radius
from robustvlm.certify.direction import PredictableDirection, norm_lower_bound
from robustvlm.certify.distribution import cdf_lower, cdf_plug_in, cdf_radius, cdf_upper, layer_cake
from robustvlm.certify.engine import SamplingEngine
from robustvlm.certify.fcsb import VACUOUS, fcsb_cos, fcsb_inner, fcsb_radius
from robustvlm.certify.feature_claim import FeatureRadius, FeatureTest, feature_radius
from robustvlm.certify.halfspace import halfspace_lower, halfspace_shift
from robustvlm.certify.limits import (
    best_class_radius,
    best_feature_radius,
    best_mean,
    best_paper_radius,
    best_tangent_radius,
    best_vote_radius,
    best_vote_test_radius,
    samples_needed,
)
from robustvlm.certify.noise import CHUNK, Address, image_digest, noise_chunk, settings_digest, stream_seed
from robustvlm.certify.normal import shift_down, shift_up
from robustvlm.certify.open_vocabulary import covariance_upper, mean_ball, vocabulary_radius
from robustvlm.certify.openset import (
    NormRange,
    acceptance_radius,
    contrast_vectors,
    norm_upper_bound,
    openset_score,
    pilot_choice,
    rejection_radius,
    score_lower,
    score_upper,
)
from robustvlm.certify.openset_claim import OpensetRadius, RuleRadius
from robustvlm.certify.openset_deployed import predict_openset
from robustvlm.certify.openset_rule import OpensetRule
from robustvlm.certify.record import Certificate, Provenance, best_of, expected_false
from robustvlm.certify.resize import resize_matrix, resize_norm, source_norm
from robustvlm.certify.rounding import floor_to, format_down, format_exact, format_up
from robustvlm.certify.sampling import Certifier, Finding, Request
from robustvlm.certify.sampling_lane import Sampled, Task
from robustvlm.certify.scores import as_scores, direction_scores, mean_feature, unit_rows
from robustvlm.certify.tangent import Tangent, TangentTest, tangent_at, tangent_radius
from robustvlm.certify.vector_np import required_norm, vector_cos, vector_radius
from robustvlm.certify.vector_table import VectorTable, vector_table
from robustvlm.certify.vote import vote_predict, vote_radius

__all__ = [
    "ANYTIME_BOUNDS",
    "CHUNK",
    "VACUOUS",
    "Address",
    "Band",
    "BettingState",
    "Certificate",
    "Certifier",
    "ClassAtRadius",
    "ClassRadius",
    "ClassTest",
    "Decision",
    "FeatureRadius",
    "FeatureTest",
    "Finding",
    "FixedSample",
    "NormRange",
    "OpensetRadius",
    "OpensetRule",
    "PredictableDirection",
    "Provenance",
    "Request",
    "RuleRadius",
    "Sampled",
    "SamplingEngine",
    "SequentialTest",
    "Sideways",
    "Tangent",
    "TangentTest",
    "Task",
    "VectorTable",
    "VocabularyRadius",
    "VoteAtRadius",
    "VoteRadius",
    "acceptance_radius",
    "as_scores",
    "best_class_radius",
    "best_feature_radius",
    "best_mean",
    "best_of",
    "best_paper_radius",
    "best_tangent_radius",
    "best_vote_radius",
    "best_vote_test_radius",
    "betting_lower",
    "cdf_lower",
    "cdf_plug_in",
    "cdf_radius",
    "cdf_upper",
    "class_angle",
    "class_margin_needed",
    "class_margin_radius",
    "clopper_pearson_lower",
    "cone_cos",
    "cone_radius",
    "contrast_vectors",
    "covariance_upper",
    "deployed_cos",
    "deployed_feature_cos",
    "deployed_feature_radius",
    "deployed_from_angle",
    "deployed_inner",
    "direction_cos",
    "direction_radius",
    "direction_scores",
    "dkw_band",
    "drift",
    "ell_band",
    "expected_false",
    "fcsb_cos",
    "fcsb_inner",
    "fcsb_radius",
    "feature_radius",
    "floor_to",
    "format_down",
    "format_exact",
    "format_up",
    "halfspace_lower",
    "halfspace_shift",
    "hcr_drift",
    "hoeffding_lower",
    "image_digest",
    "index_band",
    "layer_cake",
    "mean_ball",
    "mean_feature",
    "mean_lower",
    "mean_margin_radius",
    "noise_chunk",
    "norm_lower",
    "norm_lower_bound",
    "norm_upper",
    "norm_upper_bound",
    "openset_score",
    "pilot_choice",
    "predict",
    "predict_openset",
    "rejection_radius",
    "required_norm",
    "resize_matrix",
    "resize_norm",
    "rival_normals",
    "samples_needed",
    "score_lower",
    "score_upper",
    "settings_digest",
    "shift_down",
    "shift_up",
    "side_upper",
    "sideways",
    "source_norm",
    "stream_seed",
    "tangent_at",
    "tangent_radius",
    "unit_rows",
    "vector_cos",
    "vector_radius",
    "vector_table",
    "vocabulary_radius",
    "vote_predict",
    "vote_radius",
    "vote_share_needed",
]
