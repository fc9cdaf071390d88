"""Several wordings of every class at once: a class that holds whichever of them is used (T23)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from robustvlm.certify.classes import rival_normals
from robustvlm.certify.normal import Array
from robustvlm.errors import UserError

# T23. Let T_k be the finitely many texts that class k may be written with, fixed before the noise is drawn. Class y is
# the answer for every choice of texts, at every x' within R, if all margins <m(x'), t - t'>, t in T_y and t' in T_k,
# are above 0 there. R is the least of the radii R_p of single pairs p of texts. Where it is too large, it is too large
# for the pair p* whose *true* radius is least, which depends on no sample: R_p* >= R exceeds it too, with probability
# at most alpha. So all pairs are bounded at the same alpha, and no union is paid, however many wordings there are (T8).
#
# By vote: a copy counts that is put into y under every choice of texts. Under each single choice at least these are.

MOST_PAIRS = 1_000_000


@dataclass(frozen=True, eq=False)
class Wordings:
    """The texts that each class may be written with, as unit vectors.

    Args:
        vectors: of each class, [P_k, D]. aligned: the i-th texts of all classes are used together, as with templates;
            else each class may use any of its own.

    Raises:
        UserError: fewer than two classes, a class without a text, or other numbers of texts though they are aligned.

    Example:
        >>> two = Wordings((np.array([[1.0, 0.0], [0.8, 0.6]]), np.array([[0.0, 1.0], [-0.6, 0.8]])), aligned=True)
        >>> len(two.normals(0)), two.sure([[0.9, 0.436], [0.3, 0.954]], 0).tolist()
        (2, [True, False])
    """

    vectors: tuple[Array, ...]
    aligned: bool

    def __post_init__(self) -> None:
        counts = {len(texts) for texts in self.vectors}
        if len(self.vectors) < 2 or not counts or min(counts) < 1:
            raise UserError("wordings are of at least two classes, each with at least one text")
        if self.aligned and len(counts) > 1:
            raise UserError(f"wordings that are used together are as many for every class, got {sorted(counts)}")

    @property
    def count(self) -> int:
        """How many texts there are in all."""
        return sum(map(len, self.vectors))

    @cached_property
    def tables(self) -> list[Array]:
        """The class texts [K, D] of each wording, of aligned ones."""
        return [np.stack([texts[i] for texts in self.vectors]) for i in range(len(self.vectors[0]))]

    def normals(self, label: int) -> Array | None:
        """Return unit normals [M, D] from all texts of the rivals to those of the label that they may stand beside.

        None if a rival has a text of the label.

        Raises:
            UserError: there are more pairs than can be judged.
        """
        if self.aligned:
            parts = [rival_normals(table, label) for table in self.tables]
        else:
            own, rivals = self.vectors[label], np.concatenate(self.vectors[:label] + self.vectors[label + 1 :])
            if len(own) * len(rivals) > MOST_PAIRS:
                raise UserError(
                    f"{len(own)} texts of a class and {len(rivals):,} of its rivals make {len(own) * len(rivals):,} "
                    f"pairs, more than {MOST_PAIRS:,}: pass fewer paraphrases"
                )
            parts = [rival_normals(np.vstack([text, rivals]), 0) for text in own]
        return None if any(part is None for part in parts) else np.concatenate([p for p in parts if p is not None])

    def sure(self, features: ArrayLike, label: int) -> npt.NDArray[np.bool_]:
        """Return which features [n, D] are put into the label whichever texts are used; failed ones are not."""
        rows = np.asarray(features, dtype=np.float64)
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        near = [np.where(finite[:, None], rows, 0.0) @ texts.T for texts in self.vectors]
        others = near[:label] + near[label + 1 :]
        if self.aligned:
            won = np.stack([near[label] > other for other in others]).all(axis=(0, 2))
        else:
            won = near[label].min(axis=1) > np.max([other.max(axis=1) for other in others], axis=0)
        return np.asarray(finite & won)
