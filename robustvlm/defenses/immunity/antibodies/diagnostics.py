"""Whether antibodies are any good: do they cover what they should, and do they keep clear of the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustvlm.defenses.immunity.antibodies.band import class_cosines
from robustvlm.defenses.immunity.antibodies.texts import Antibodies
from robustvlm.errors import UserError


def coverage(antibodies: Antibodies, held_out: Tensor, angle: float) -> Tensor:
    """Return, for each held-out text of unknown things [N, D], whether an antibody lies within `angle` degrees: [N].

    The share of True is the coverage that the theory of Immuno-VLM (arXiv 2605.30745) asks for.

    Raises:
        UserError: an angle outside 0 to 180.

    Example:
        >>> from robustvlm.defenses.immunity.antibodies.texts import AntibodyText
        >>> one = Antibodies((AntibodyText("wolf", "dog"),), torch.tensor([[1.0, 0.0]]))
        >>> coverage(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 30.0)
        tensor([ True, False])
    """
    if not 0.0 <= angle <= 180.0:
        raise UserError(f"the angle must be between 0 and 180 degrees, got {angle:g}")
    return nearest_angles(antibodies, held_out) <= angle


def nearest_angles(antibodies: Antibodies, held_out: Tensor) -> Tensor:
    """Return the angle in degrees from each unit row [N, D] to the nearest antibody, [N]; 180 where there is none."""
    if not len(antibodies):
        return torch.full((len(held_out),), 180.0)
    cosines = (held_out @ antibodies.embeddings.to(held_out).T).amax(dim=1)
    # Rounding gives cosines a little above 1, and equal vectors a degree or so of angle.
    return cosines.clamp(-1.0, 1.0).arccos() * (180.0 / math.pi)


def margins(antibodies: Antibodies, prototypes: Tensor) -> Tensor:
    """Return each class's margin to the nearest antibody, 1 - max_a <mu_k, a>, [K]; 2 where there is none.

    Args:
        antibodies: unit embeddings [A, D].
        prototypes: unit vectors [K, D] or [K, M, D].
    """
    if not len(antibodies):
        return torch.full((len(prototypes),), 2.0)
    return 1.0 - class_cosines(antibodies.embeddings.to(prototypes), prototypes).amax(dim=0)
