"""What purifier and mapper are trained for: stage one and stage two of FS-PSM (arXiv 2601.16200)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.purify.unet import coefficients


@dataclass(frozen=True)
class PurifierWeights:
    """Weights of the terms of stage one, for means over pixels and images.

    Args:
        diffusion: of the denoising loss at unit weight for every noise level.
        feature: lambda_1, of 1 - cos to the clean feature.
        pixel: lambda_2, of the squared error of the pixels.
    """

    diffusion: float = 1.0
    feature: float = 1.0
    pixel: float = 1.0


@dataclass(frozen=True)
class MapperWeights:
    """Weights of the terms of stage two: `statistics` is lambda_3; 1 - cos to the clean feature has weight 1."""

    statistics: float = 1.0


def purifier_terms(
    estimate: Tensor, clean: Tensor, sigma: Tensor, features: Tensor, clean_features: Tensor
) -> dict[str, Tensor]:
    """Return the terms of stage one as scalars.

    * diffusion: |P(x + e) - x|^2 / c_out(sigma)^2, the U-Net's own squared error, which is of order one at every noise
      level (Karras et al. 2022, arXiv 2206.00364, section 5);
    * feature: 1 - cos(phi(P(x + e)), phi(x));
    * pixel: |P(x + e) - x|^2.

    Means over images and pixels (our reading of the squared norms).

    Args:
        estimate, clean: pixels [B, 3, H, W]; sigma: noise levels [B], above 0.
        features, clean_features: of both [B, D].

    Example:
        >>> x, z = torch.rand(2, 3, 4, 4), torch.eye(2)
        >>> terms = purifier_terms(x, x, torch.tensor([0.1, 0.5]), z, z)
        >>> {name: round(value.item(), 6) for name, value in terms.items()}
        {'diffusion': 0.0, 'feature': 0.0, 'pixel': 0.0}
    """
    squared = (estimate.float() - clean.float()).square().mean(dim=(1, 2, 3))
    scale = coefficients(sigma.float())[1]
    return {
        "diffusion": (squared / scale.square()).mean(),
        "feature": (1 - F.cosine_similarity(features.float(), clean_features.float(), dim=1)).mean(),
        "pixel": squared.mean(),
    }


def mapper_terms(mapped: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Return the terms of stage two as scalars.

    * similarity: 1 - cos(M(z), phi(x));
    * statistics: squared differences of the per-dimension mean and standard deviation over the batch, summed over the
      dimensions, so that the mapper cannot buy cosine by pulling all features to one place.

    The paper's third term, |M(z, 0) - z|^2, is zero by construction (see `Mapper`).

    Args:
        mapped, clean: unit features [B, D], B >= 2.

    Example:
        >>> z = torch.nn.functional.normalize(torch.rand(4, 8), dim=1)
        >>> {name: abs(round(value.item(), 5)) for name, value in mapper_terms(z, z).items()}
        {'similarity': 0.0, 'statistics': 0.0}
    """
    mapped, clean = mapped.float(), clean.float()
    mean_gap = (mapped.mean(dim=0) - clean.mean(dim=0)).square().sum()
    spread_gap = (_spread(mapped) - _spread(clean)).square().sum()
    return {"similarity": (1 - F.cosine_similarity(mapped, clean, dim=1)).mean(), "statistics": mean_gap + spread_gap}


def _spread(features: Tensor) -> Tensor:
    # The root has no gradient at 0, which a dimension without any spread would ask for.
    return (features.var(dim=0, unbiased=False) + 1e-12).sqrt()


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """Return the terms and, as "loss", their weighted sum.

    Example:
        >>> weighted({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"a": 1.0, "b": 0.5})["loss"]
        tensor(3.5000)
    """
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": total, **terms}
