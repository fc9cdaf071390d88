"""Certified robustness of smoothed features: one module an idea; here what a run and a reader of its numbers need.

Every certificate is a pure function of bounds on the clean image's smoothed feature and of `a = eps / sigma`:

* `means`, `bands`: confidence bounds for means and for survival functions of [0, 1] scores;
* `feature`: the angle between the smoothed features of clean and attacked image (T2-T4), and along a fixed direction as
  published and corrected (T1); `shapes`, `tangent`: from whole distributions, their anytime-valid form, covariances;
* `angles`: the cosine from the angles' distribution and the mean (T20); `core`: all directions at once (T21);
* `classes`: the class of the mean feature (T8) and the hard vote; `ranks`: the first k; `openset`: refusals;
* `local_noise`: noise chosen for each image (T22); `wordings`: all texts of the classes at once
  (T23; `claims.changed_words`: with changed words, T24);
* `threats`: what else than l2 an attacker may do, ellipsoids (T29) among it; `rotation`: angles between samples (T30);
* `deployed`: what n0 inference samples keep of a certificate (T10);
* `noise`, `certifier`, `engine`: fresh noise, what a claim wants of it, and batches of many images; `claims`: the
  certifiers of each claim (fixed n, or stopping as soon as a radius is decided) and what they state;
* `limits`: what settings can give at best; `record`: what a certificate must state, and what a radius at the model's
  resolution is worth at the source.

Radii are in the pixel units of sigma and hold strictly inside, up to floating point. Zero is ABSTAIN.
"""

from robustvlm.certify.certifier import Certifier, Finding, Request
from robustvlm.certify.claims.class_ import ClassAtRadius, ClassRadius, VocabularyRadius
from robustvlm.certify.claims.feature import FeatureRadius, FeatureTest
from robustvlm.certify.claims.openset import OpensetRadius, RuleRadius
from robustvlm.certify.claims.vote import VoteAtRadius, VoteRadius
from robustvlm.certify.classes import vote_predict, vote_radius
from robustvlm.certify.deployed import deployed_feature_cos, predict, predict_openset
from robustvlm.certify.engine import Job, Sampled, SamplingEngine
from robustvlm.certify.feature import VACUOUS, cone_cos, fcsb_cos, vector_table
from robustvlm.certify.noise import image_digest, settings_digest
from robustvlm.certify.openset import OpensetRule
from robustvlm.certify.record import Certificate, Provenance, resize_norm, source_norm
from robustvlm.core.registry import make_callable
from robustvlm.text import floor_to, format_down, format_exact, format_up

__all__ = [
    "VACUOUS", "Certificate", "Certifier", "ClassAtRadius", "ClassRadius", "FeatureRadius", "FeatureTest", "Finding",
    "Job", "OpensetRadius", "OpensetRule", "Provenance", "Request", "RuleRadius", "Sampled", "SamplingEngine",
    "VocabularyRadius", "VoteAtRadius", "VoteRadius", "cone_cos", "deployed_feature_cos", "fcsb_cos", "floor_to",
    "format_down", "format_exact", "format_up", "image_digest", "predict", "predict_openset", "resize_norm",
    "settings_digest", "source_norm", "vector_table", "vote_predict", "vote_radius",
]  # fmt: skip

# `robustvlm.certify("tiny", claim="class")` is the command; what is above is its mathematics.
make_callable(__name__, "robustvlm.commands.certify:certify")
