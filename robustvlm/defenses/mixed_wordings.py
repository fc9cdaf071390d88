"""The model that certificates against changed words are about: each copy reads one wording of the classes (T24)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robustvlm.core import MAX_N0
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models.zero_shot import class_embeddings


class MixedWordings:
    """A smoothed zero-shot classifier whose copies vote, each by a wording of all classes that is drawn for it.

    What `certify --claim vote --paraphrases templates --words R` certifies, of infinitely many copies: within the
    radius, and with up to R words of the prompts changed, another class than the certified one is answered with
    probability at most alpha / 2, at images and prompts chosen without knowing the draws.

    Args:
        vlm: the smoothed encoder. class_names: of the classes. templates: the wordings, at least two.

    Raises:
        UserError: the encoder is not smoothed, or there is one wording only.

    Example:
        >>> from robustvlm.defenses import smooth
        >>> from robustvlm.models import load_model
        >>> model = MixedWordings(smooth(load_model("tiny"), 0.02), ["apple", "dog"], ["{}", "a {}", "an icon of a {}"])
        >>> len(model.predict(torch.rand(2, 3, 64, 64), n0=32))
        2
    """

    def __init__(self, vlm: SmoothedVLM, class_names: Sequence[str], templates: Sequence[str]) -> None:
        if not isinstance(vlm, SmoothedVLM) or vlm.per_image:
            raise UserError("only an encoder smoothed at one noise level has such copies: pass smooth(model, SIGMA)")
        if len(templates) < 2:
            raise UserError(f"copies read one of several wordings: pass at least two templates, got {len(templates)}")
        self.vlm, self.class_names = vlm, tuple(class_names)
        self.tables = torch.stack([class_embeddings(vlm, list(class_names), [one]) for one in templates])

    @torch.no_grad()
    def votes(self, pixels: Tensor, n0: int) -> Tensor:
        """Return the votes [B, K] of `n0` fresh copies of each image [B, 3, H, H]; failed copies are for no class."""
        if not 1 <= n0 <= MAX_N0:
            raise UserError(f"a vote needs between 1 and {MAX_N0:,} copies, got {n0}")
        features = self.vlm.noisy_features(pixels, n0)
        wording = torch.randint(len(self.tables), features.shape[:2], device=features.device)
        logits = torch.einsum("bnd,bnkd->bnk", features.to(self.tables), self.tables.to(features.device)[wording])
        cast = logits.isfinite().all(dim=2)
        chosen = torch.nan_to_num(logits).argmax(dim=2)
        votes = torch.nn.functional.one_hot(chosen, len(self.class_names)) * cast[..., None]
        found: Tensor = votes.sum(dim=1)
        return found

    def predict(self, pixels: Tensor, n0: int | None = None, alpha: float = 0.001) -> list[int | None]:
        """Return the class of each image [B, 3, H, H], or None where the votes do not decide it at `alpha`."""
        from robustvlm.certify import vote_predict  # certificates' mathematics, which attacks do without

        votes = self.votes(pixels, self.vlm.n0 if n0 is None else n0).cpu().numpy()
        return [vote_predict(np.asarray(row), alpha) for row in votes]
