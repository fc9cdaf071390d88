"""Certified open-set decisions: what bounds the score, and the linear claims that keep a decision (T5, T8).

Accepting bounds S from below with one class from the pilot (a minimum over antibodies); rejecting bounds it from above
with one antibody per class from the pilot (a maximum over classes). Both are minima over a fixed set of claims and need
no correction. The side to test, the class and the antibodies come from the pilot, tau from other data altogether.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from robustvlm.certify.normal import Array
from robustvlm.errors import UserError

# Certified open-set decisions for `S = max_k min_a <z, mu_k - lam b_a>` with z the smoothed feature (T5, T8)


def contrast_vectors(prototypes: ArrayLike, antibodies: ArrayLike, lam: float) -> Array:
    """Return `v_ka = mu_k - lam b_a`, [K, A, D]; without antibodies (A = 0) just the prototypes, [K, 1, D].

    Raises:
        UserError: `lam` is negative or the dimensions differ.

    Example:
        >>> contrast_vectors([[1.0, 0.0]], [[0.0, 1.0]], 0.5).tolist()
        [[[1.0, -0.5]]]
    """
    mu, b = np.asarray(prototypes, dtype=np.float64), np.asarray(antibodies, dtype=np.float64)
    if not lam >= 0.0:
        raise UserError(f"the weight of the antibodies must not be negative, got {lam}")
    if b.size == 0:
        return mu[:, None, :]
    if mu.ndim != 2 or b.ndim != 2 or mu.shape[1] != b.shape[1]:
        raise UserError(f"expected prototypes [K, D] and antibodies [A, D], got {list(mu.shape)} and {list(b.shape)}")
    return mu[:, None, :] - lam * b[None, :, :]


def openset_score(z: ArrayLike, vectors: Array) -> float:
    """Return `max_k min_a <z, v_ka>` for one feature [D].

    Example:
        >>> openset_score([1.0, 0.0], contrast_vectors([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]], 0.5))
        1.0
    """
    return float((vectors @ np.asarray(z, dtype=np.float64)).min(axis=1).max())


def pilot_choice(z: ArrayLike, vectors: Array) -> tuple[int, Array]:
    """Return the class `k*` and, per class, the antibody `a*(k)` that decide the score at a pilot feature [D].

    Example:
        >>> k, a = pilot_choice([1.0, 0.0], contrast_vectors([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], 0.5))
        >>> k, a.tolist()
        (0, [1, 1])
    """
    values = vectors @ np.asarray(z, dtype=np.float64)
    return int(values.min(axis=1).argmax()), np.asarray(values.argmin(axis=1))


# The open-set rule with a threshold for each class, and the linear claims that keep its decision (T5, T8).
#
# Accepted iff S(z) >= tau_y, with z = m(x) the smoothed feature, s_k(z) = max_m <z, mu_km>, y = argmax_k s_k(z) the
# predicted class, and S(z) = s_y(z) - lam max_b <z, b>. For a prototype p write S_p(z) = min_b <z, p - lam b>.
#
# *Acceptance.* Take a prototype p and let C be any set of prototypes that holds all of p's class, chosen by the pilot.
# If
#
#     (i)  <z, p - q> > 0 for every prototype q outside C, and
#     (ii) S_p(z) >= max of tau_k over the classes k of C,
#
# then the image is accepted. Proof: by (i) no q outside C is the nearest, so the nearest prototype, and with it y, is
# in C. S(z) >= S_p(z), because p is one of the prototypes that s_y is the maximum over; with (ii), S(z) >= tau_y. []
#
# *Rejection.* Take a prototype p and a set C of prototypes, chosen by the pilot, and an antibody b(q) for each q of C.
# If
#
#     (i)  <z, p - q> > 0 for every prototype q outside C, p itself being in C, and
#     (ii) <z, q - lam b(q)> < tau_k for every q of C, k its class,
#
# then the image is rejected. Proof: as before the nearest prototype q* is in C; S(z) = S_q*(z) <= <z, q* - lam b(q*)>,
# which by (ii) is below tau_y. []
#
# *With a floor* b0, antibodies count only above it: S(z) = s_y(z) - lam max(0, max_b <z, b> - b0). The minimum over
# antibodies is then one over the affine functions <z, p> and <z, p - lam b> + lam b0, so that S_p is again a minimum of
# finitely many; (ii) of an acceptance asks it of each of them, (ii) of a rejection of one that the pilot chooses for q.
#
# Both are intersections of claims that are linear in z and fixed before the estimation samples are drawn, each tested
# at level alpha; the intersection needs no correction (T8). C makes the thresholds count that can matter: with all
# prototypes in C, acceptance is "S_p >= max tau" and rejection "S_q < tau_q for every q".


@dataclass(frozen=True)
class Claims:
    """Linear claims `<z, v> >= least`: vectors [M, D] and least [M]; and whether they say "accepted" or "rejected"."""

    vectors: Array
    least: Array
    accepts: bool


@dataclass(frozen=True, eq=False)
class OpensetRule:
    """Prototypes [P, D] with their classes [P], antibodies [A, D] of weight `weight`, thresholds [K].

    Args:
        floor: cosine from which antibodies count, as in `open_set_score`; None: they always do.

    Raises:
        UserError: parts that do not fit each other, or a negative weight.

    Example:
        >>> rule = OpensetRule(np.eye(2), np.array([0, 1]), np.zeros((0, 2)), 0.0, np.array([0.5, 0.9]))
        >>> rule.margin(np.array([0.6, 0.8])), rule.predicted(np.array([0.6, 0.8]))
        (-0.09999999999999998, 1)
    """

    prototypes: Array
    classes: npt.NDArray[np.int64]
    antibodies: Array
    weight: float
    thresholds: Array
    floor: float | None = None

    def __post_init__(self) -> None:
        fits = self.prototypes.ndim == 2 and self.classes.shape == (len(self.prototypes),)
        fits = fits and self.antibodies.shape[1:] == self.prototypes.shape[1:] and self.thresholds.ndim == 1
        if not fits or set(self.classes.tolist()) != set(range(len(self.thresholds))):
            raise UserError(
                "an open-set rule needs prototypes [P, D] of all classes, antibodies [A, D] and thresholds [K]"
            )
        if not self.weight >= 0.0:
            raise UserError(f"the weight of the antibodies must not be negative, got {self.weight}")

    @property
    def reach(self) -> float:
        """The largest length of a contrast vector p - lam b."""
        return float(max(np.linalg.norm(self.contrasts(p)[0], axis=1).max() for p in self.prototypes))

    @property
    def room(self) -> float:
        """How far from 0 the bound on a contrast may lie."""
        return float(np.abs(self.thresholds).max()) + abs(self.weight * (self.floor or 0.0))

    def predicted(self, z: Array) -> int:
        """Return the class of the nearest prototype to a feature [D]."""
        return int(self.classes[(self.prototypes @ z).argmax()])

    def score(self, z: Array) -> float:
        """Return S of a feature [D]."""
        return float((self.prototypes @ z).max()) - self.against(z)

    def against(self, z: Array) -> float:
        """Return what the antibodies take off at a feature [D]."""
        vector, shift = self.nearest(z)
        return float(vector @ z) - shift

    def margin(self, z: Array) -> float:
        """Return S less the threshold of the predicted class: accepted are features with a margin of at least 0."""
        return self.score(z) - float(self.thresholds[self.predicted(z)])

    def claims(self, z: Array) -> Claims:
        """Return the claims that keep the decision at a pilot feature [D].

        C is the choice, among the nearest prototypes up to some rank, whose tightest claim has most room at the pilot.
        """
        make = self._acceptance if self.margin(z) >= 0.0 else self._rejection
        order = np.argsort(-(self.prototypes @ z), kind="stable")
        found = [make(z, order, size) for size in self._sizes(order)]
        return max(found, key=lambda claims: _room(claims, z))

    def _sizes(self, order: npt.NDArray[np.int64]) -> list[int]:
        """Ranks at which C may end: powers of two, and all."""
        return sorted({min(2**i, len(order)) for i in range(len(order).bit_length() + 1)})

    def _within(self, order: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.bool_]:
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order[:size]] = True
        return np.asarray(chosen | (self.classes == self.classes[order[0]]))

    def _apart(self, order: npt.NDArray[np.int64], within: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
        """Claim (i): strictly nearer to the leading prototype than to those outside C."""
        vectors = self.prototypes[order[0]] - self.prototypes[~within]
        return vectors, np.full(len(vectors), np.nextafter(0.0, 1.0))

    def _acceptance(self, z: Array, order: npt.NDArray[np.int64], size: int) -> Claims:
        del z
        within = self._within(order, size)
        apart, positive = self._apart(order, within)
        own, shifts = self.contrasts(self.prototypes[order[0]])
        # Deployed classifiers accept strictly above the threshold.
        highest = float(np.nextafter(self.thresholds[self.classes[within]].max(), np.inf))
        least = np.where(shifts == 0.0, highest, np.nextafter(highest - shifts, np.inf))
        return Claims(np.concatenate([own, apart]), np.concatenate([least, positive]), True)

    def _rejection(self, z: Array, order: npt.NDArray[np.int64], size: int) -> Claims:
        within = self._within(order, size)
        apart, positive = self._apart(order, within)
        nearest, shift = self.nearest(z)
        below = nearest - self.prototypes[within]
        least = np.nextafter(shift - self.thresholds[self.classes[within]], np.inf)  # strictly below tau
        return Claims(np.concatenate([below, apart]), np.concatenate([least, positive]), False)

    def nearest(self, z: Array) -> tuple[Array, float]:
        """Return v [D] and c with <z, v> - c what the antibodies take off at a feature [D]: lam b and lam b0, or 0."""
        cosines = self.antibodies @ z
        if not len(cosines) or (self.floor is not None and cosines.max() <= self.floor):
            return np.zeros(self.prototypes.shape[1]), 0.0
        return self.weight * self.antibodies[cosines.argmax()], self.weight * (self.floor or 0.0)

    def contrasts(self, prototype: Array) -> tuple[Array, Array]:
        """Return vectors [M, D] and shifts [M] with S_p(z) = min_i <z, v_i> + c_i for a prototype p [D]."""
        alone = prototype[None], np.zeros(1)
        if not len(self.antibodies):
            return alone
        vectors = np.asarray(prototype - self.weight * self.antibodies)
        if self.floor is None:
            return vectors, np.zeros(len(vectors))
        shifts = np.append(np.full(len(vectors), self.weight * self.floor), 0.0)
        return np.concatenate([vectors, alone[0]]), shifts


def _room(claims: Claims, z: Array) -> float:
    """Return by how much the tightest claim holds at `z`, as a distance: what noise and attack may take away."""
    lengths = np.maximum(np.linalg.norm(claims.vectors, axis=1), 1e-300)
    return float(((claims.vectors @ z - claims.least) / lengths).min())
