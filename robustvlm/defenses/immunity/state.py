"""All that an immunised model holds besides its encoder, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.data.names import places_of
from robustvlm.defenses.immunity.adapter import Adapter
from robustvlm.defenses.immunity.antibodies import Antibodies
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class Immunity:
    """Prototypes [K, M, D], antibodies [A, D] with their weight, thresholds [K], and the adapter before them.

    Attributes:
        weight: lambda_inf of S_DIS.
        noisy: thresholds [K] of S_DIS of the mean adapted feature under Gaussian noise, by its sigma.

    Raises:
        UserError: parts that do not fit each other, or values that are not finite.
    """

    class_names: tuple[str, ...]
    prototypes: Tensor
    antibodies: Antibodies
    weight: float
    thresholds: Tensor
    adapter: Adapter
    noisy: Mapping[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, dim = len(self.class_names), self.prototypes.shape[-1]
        fits = self.prototypes.ndim == 3 and len(self.prototypes) == count and self.thresholds.shape == (count,)
        fits = fits and self.antibodies.embeddings.shape[1] == dim == self.adapter.outer.out_features
        if not fits or any(values.shape != (count,) for values in self.noisy.values()):
            raise UserError("prototypes, antibodies, thresholds and adapter do not fit each other and the classes")
        parts = (self.prototypes, self.antibodies.embeddings, self.thresholds, *self.noisy.values())
        if not all(bool(part.isfinite().all()) for part in parts):
            raise UserError("prototypes, antibodies and thresholds must be finite")
        if not self.weight >= 0:
            raise UserError(f"the weight of the antibodies must not be negative, got {self.weight:g}")

    def ordered(self, class_names: Sequence[str], where: str) -> Immunity:
        """Return the same with classes in the order of `class_names`, which must be the same classes.

        Raises:
            UserError: other classes; `where` names the model.
        """
        places = places_of(class_names, self.class_names)
        strange = next((name for name, place in zip(class_names, places, strict=True) if place is None), None)
        missing = next((name for row, name in enumerate(self.class_names) if row not in places), None)
        if strange is not None or missing is not None:
            what = f"'{strange}' is none of them" if strange is not None else f"the data lack '{missing}'"
            raise UserError(
                f"'{where}' was immunised for {len(self.class_names)} classes and {what}: pass data with those "
                "classes, or immunise a model for these (one more class: --add-class)"
            )
        rows = torch.tensor([place for place in places if place is not None], device=self.prototypes.device)
        return replace(
            self,
            class_names=tuple(class_names),
            prototypes=self.prototypes[rows],
            thresholds=self.thresholds[rows],
            noisy={sigma: values[rows] for sigma, values in self.noisy.items()},
        )
