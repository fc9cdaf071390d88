"""Goals about the feature itself: away from the clean one, or to a target."""

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.goals.base import GOALS, REJECTED, Case, Goal, GoalKind, GoalWords, Known
from robustvlm.core.seeds import row_sums, rows_times
from robustvlm.errors import UserError


class FeatureGoal(Goal):
    """A goal about unit features [B, D]; the reference holds every image's clean feature.

    Args:
        head: class weights [K, D] that turn features into logits, for predictions; None: there are no classes.
    """

    leave, of_features, refers = False, True, True

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

    def reference(self, output: Tensor, label: Tensor) -> Tensor:
        del label
        return F.normalize(output, dim=1)


class FeatureAway(FeatureGoal):
    """A feature whose cosine to the image's clean feature lies below `min_cos`.

    Example:
        >>> goal = FeatureAway(0.5)
        >>> goal.margin(torch.tensor([[0.6, 0.8]]), Case(torch.tensor([0]), None, torch.tensor([[1.0, 0.0]]))).item()
        0.10000...
    """

    spec, still_at_image, labelled = "feature", True, False

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
        self.labelled = rivals is not None

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


# How these are written, and what they are called


def _read(target: str, known: Known) -> tuple[Goal, ...]:
    if not target:
        return (FeatureAway(known.min_cos, head=known.head),)
    if known.feature_of is None:
        raise UserError(
            f"the goal 'feature:{target}' cannot be read here: pass robustvlm.attacks.FeatureTo(unit_feature)"
        )
    feature, picture = known.feature_of(target)
    return (FeatureTo(feature, rivals=None if picture else known.embeddings, name=target, head=known.head),)


def _words(target: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del can_reject
    if target:
        return GoalWords(
            title=f"features moved to {target}",
            effect=f"move the feature to {target}, past the rival it starts from, on",
            whom="images whose feature was not there before",
            before="not there when clean",
            held="nearer to the rival",
            nothing=f"The feature of every image was at {target} before any attack, so there was nothing to attack.",
            leave=False,
        )
    below = f"below {min_cos:g}" if min_cos is not None else "below the threshold"
    return GoalWords(
        title="features moved away from the clean ones",
        effect=f"push the cosine to the clean feature {below} on",
        whom="images",
        before="images",
        held=f"cosine not {below}",
        nothing="The features of all images were away from themselves before any attack: the model is random.",
        leave=False,
    )


GOALS["feature"] = GoalKind(("feature", "feature:FILE.png", "feature:TEXT"), _read, _words)
