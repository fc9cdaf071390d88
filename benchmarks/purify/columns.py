"""Everything that one set of noisy features says of an image."""

from __future__ import annotations

from typing import Any

from robustvlm.certify import bands, certifier, classes, shapes
from robustvlm.certify.claims.feature import feature_radius
from robustvlm.certify.feature import VACUOUS, PredictableDirection, norm_lower_bound, vector_table

ALPHA, COS0 = 0.001, 0.5
EPS = (0.1, 0.25, 0.5)
PILOT = 32


def columns(features: Any, anchor: Any, text: Any, sigma: float) -> dict[str, Any]:
    """Return scores and certificates, each at level ALPHA, for unit features [n, D] of noisy copies of one image.

    * score: mean of (1 + cos(f(x + e), f(x))) / 2, f(x) the encoder's feature of the image itself;
    * cos@eps: certified cos(m(x'), m(x)) (T4); radius: largest with cos >= COS0;
    * anchored@eps: certified cos(m(x'), f(x)) (T5 along f(x)), which features that noise has made alike do not get;
    * class: of the mean feature; class_radius: certified for the pilot's class (P1-CDF), with that class.
    """
    n = len(features)
    at_anchor = certifier.direction_scores(features, anchor)
    r = norm_lower_bound(PredictableDirection(features.shape[1]).scores(features), ALPHA)
    pilot, rest = features[:PILOT], features[PILOT:]
    pilot_class = int((pilot.mean(axis=0) @ text.T).argmax())
    table, band = vector_table(), bands.ell_band(n, ALPHA)
    found: dict[str, Any] = {
        "score": float(at_anchor.mean()),
        "r": r,
        "radius": feature_radius(r, COS0, sigma),
        "class": int((features.mean(axis=0) @ text.T).argmax()),
        "class_radius": classes.class_margin_radius(rest, text, pilot_class, sigma, bands.ell_band(len(rest), ALPHA)),
        "pilot_class": pilot_class,
    }
    for eps in EPS:
        found[f"cos@{eps}"] = float(table.cos(r, eps / sigma))
        inner = 2.0 * float(shapes.cdf_lower(at_anchor, eps / sigma, band)) - 1.0
        found[f"anchored@{eps}"] = inner if inner > 0.0 else VACUOUS
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
