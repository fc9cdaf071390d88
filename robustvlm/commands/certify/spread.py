"""How alike the smoothed features of different images are: without it, a certified cosine says nothing.

Noise may draw all images to nearly one feature. Every cosine is then easily certified, and none tells one image from
another. So each certified cosine is held against that of the nearest other image under the same noise.
"""

import base64
import binascii
from collections.abc import Mapping
from functools import reduce

import numpy as np

from robustvlm.certify.normal import Array
from robustvlm.runs.records import Record

_ROWS = 1024  # compared at once


class Spread(Record):
    """Cosines between the smoothed features of different images, measured and not certified.

    Of features that are several tokens side by side, where each is certified, the cosine of two images is that of the
    token in which they differ most: a token of the attacked image that stays with its own tells the images apart.

    Args:
        images: compared with each other.
        between: mean cosine over all pairs.
        nearest: mean over images of the cosine to the nearest other image.
    """

    images: int
    between: float
    nearest: float


def direction(mean: Array, copies: int, parts: int = 1) -> str:
    """Return a mean feature [D] of so many noisy copies as text, scaled by the length of the ideal smoothed feature.

    Of `parts` unit tokens side by side, over the root of their number, each is scaled by its own length.

    The square of the mean's own length is too large by (1 - |m|^2) / copies, that of products of two images is not. So
    scaled, the products of two images do not fall short of their ideal features' cosine by the noise in the means. The
    text holds half-precision numbers.

    Example:
        >>> direction(np.array([0.6, 0.0]), 100) == direction(np.array([0.3, 0.0]), 10**9)
        False
        >>> vectors_of({0: direction(np.array([0.6, 0.8]), 100)})[0].round(2)
        array([0.6, 0.8])
    """
    rows = np.sqrt(parts) * mean.reshape(parts, -1)
    square = (rows * rows).sum(axis=1)
    ideal = np.maximum((copies * square - 1) / (copies - 1) if copies > 1 else square, 0.0)
    length = np.where(ideal > 0, np.sqrt(ideal), np.inf)  # no direction is left of what is all noise
    return base64.b64encode((rows / length[:, None]).astype("<f2").tobytes()).decode("ascii")


def vectors_of(texts: Mapping[int, str]) -> dict[int, Array]:
    """Return the vectors of texts that `direction` made, by image; what is none is left out."""
    found = {}
    for index, text in texts.items():
        try:
            found[index] = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float64)
        except (binascii.Error, ValueError):
            continue
    return found


def compare(vectors: Mapping[int, Array], parts: int = 1) -> tuple[Spread | None, dict[int, float]]:
    """Return how alike images are, and for each the cosine to its nearest other; None and nothing for fewer than two.

    Args:
        vectors: of each image, `parts` directions side by side.

    Example:
        >>> spread, nearest = compare({0: np.array([1.0, 0.0]), 1: np.array([0.6, 0.8]), 2: np.array([0.0, 1.0])})
        >>> round(spread.between, 2), [round(cosine, 2) for cosine in nearest.values()]
        (0.47, [0.6, 0.8, 0.8])
    """
    lengths = {len(vector) for vector in vectors.values()}
    if len(vectors) < 2 or len(lengths) > 1 or min(lengths) % parts:
        return None, {}
    rows = np.stack(list(vectors.values())).astype(np.float32)
    tokens = np.split(rows, parts, axis=1)
    nearest, total = np.empty(len(rows)), 0.0
    for start in range(0, len(rows), _ROWS):
        cosines = reduce(np.minimum, (one[start : start + _ROWS] @ one.T for one in tokens)).clip(-1, 1)
        here = np.arange(len(cosines))
        cosines[here, start + here] = 0
        total += float(cosines.sum(dtype=np.float64))
        cosines[here, start + here] = -1
        nearest[start : start + _ROWS] = cosines.max(axis=1)
    spread = Spread(images=len(rows), between=total / (len(rows) * (len(rows) - 1)), nearest=float(nearest.mean()))
    return spread, dict(zip(vectors, nearest.tolist(), strict=True))


def margin(certified: Array, nearest: Array) -> Array:
    """Return by how much the certified cosine to an image's own feature exceeds the largest one to the nearest other.

    Within the certified angle t of its own feature, an attacked feature has at most cosine cos(p - t) to the feature at
    angle p from it: the margin cos(t) - cos(p - t) is above zero as long as t is below p / 2.

    Example:
        >>> margin(np.array([1.0, np.cos(0.4), 0.5]), np.full(3, np.cos(0.8))).round(2)
        array([ 0.3,  0. , -0.5])
    """
    own = np.arccos(np.clip(certified, -1, 1))
    other = np.maximum(np.arccos(np.clip(nearest, -1, 1)) - own, 0)
    return np.asarray(np.clip(certified, -1, 1) - np.cos(other), dtype=np.float64)
