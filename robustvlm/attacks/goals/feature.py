"""Goals about the feature itself: away from the clean one, or to a target."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import REJECTED, Case, Goal
from robustvlm.core.sums import row_sums, rows_times


class FeatureGoal(Goal):
    """A goal about unit features [B, D]; the reference holds every image's clean feature.

    Args:
        head: class weights [K, D] that turn features into logits, for predictions; None: there are no classes.
    """

    two_way = True

    def __init__(self, head: Tensor | None = None) -> None:
        self.head = head

    def prediction(self, output: Tensor) -> Tensor:
        if self.head is None:
            return torch.full((len(output),), REJECTED, dtype=torch.int64, device=output.device)
        return rows_times(output, self.head.to(output)).argmax(1)

    def confidence(self, output: Tensor) -> Tensor:
        if self.head is None:
            return torch.full((len(output),), float("nan"), dtype=torch.float64, device=output.device)
        return rows_times(output, self.head.to(output)).double().softmax(1).amax(1)


class FeatureAway(FeatureGoal):
    """A feature whose cosine to the image's clean feature lies below `min_cos`.

    Example:
        >>> goal = FeatureAway(0.5)
        >>> goal.margin(torch.tensor([[0.6, 0.8]]), Case(torch.tensor([0]), None, torch.tensor([[1.0, 0.0]]))).item()
        0.10000...
    """

    spec, still_at_image = "feature", True

    def __init__(self, min_cos: float = 0.5, *, head: Tensor | None = None) -> None:
        super().__init__(head)
        self.min_cos = min_cos

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return self.cosine(output, case) - self.min_cos

    def cosine(self, output: Tensor, case: Case) -> Tensor:
        return _cosine(output, _own(case))


class FeatureTo(FeatureGoal):
    """A feature nearer to a target's than to a rival's: the image's own clean feature, or the text of its class.

    Args:
        target: unit feature [D].
        rivals: unit features [K, D] of the classes' texts, indexed by the label; None: the image's own clean feature.
        name: how the target is named.
    """

    def __init__(
        self, target: Tensor, rivals: Tensor | None = None, name: str = "target", *, head: Tensor | None = None
    ) -> None:
        super().__init__(head)
        self.target, self.rivals, self.spec = target, rivals, f"feature:{name}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        rival = _own(case) if self.rivals is None else self.rivals.to(output)[case.label]
        return _cosine(output, rival) - self.cosine(output, case)

    def cosine(self, output: Tensor, case: Case) -> Tensor:
        del case
        return _cosine(output, self.target.to(output).expand_as(output))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return row_sums(a * b.to(a))


def _own(case: Case) -> Tensor:
    assert case.reference is not None, "feature goals need the clean features"
    return case.reference
