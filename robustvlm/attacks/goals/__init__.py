"""Goals: what the attacker wants of the model, as functions of the model's raw output.

| goal               | output                | reached when                                                          |
|--------------------|-----------------------|-----------------------------------------------------------------------|
| `misclassify`      | logits                | the predicted class is wrong (and accepted, if the model may refuse)  |
| `superclass:LEVEL` | logits                | the predicted class lies in another superclass of that level          |
| `superclass:all`   | logits                | the same at the coarsest level, by one perturbation for all levels    |
| `targeted:CLASS`   | logits                | the predicted class is CLASS                                          |
| `deny`             | logits and acceptance | the model rejects the image                                           |
| `intrude`          | logits and acceptance | the model accepts the image                                           |
| `feature`          | unit features         | the cosine to the clean feature is below a threshold                  |
| `feature:TARGET`   | unit features         | the feature is nearer to the target's than to its rival's             |

A model that may refuse returns one column more than there are classes: the acceptance score, positive when the image
is accepted. Every goal is a margin that is positive until the goal is reached, so attacks, best iterates and verdicts
work alike for all of them.
"""

from __future__ import annotations

from robustvlm.attacks.goals.base import REJECTED, Case, Goal
from robustvlm.attacks.goals.classes import Misclassify, Targeted
from robustvlm.attacks.goals.feature import FeatureAway, FeatureTo
from robustvlm.attacks.goals.refusal import AcceptedMistake, Deny, Intrude
from robustvlm.attacks.goals.superclass import Superclass, SuperclassAll

__all__ = [
    "REJECTED",
    "AcceptedMistake",
    "Case",
    "Deny",
    "FeatureAway",
    "FeatureTo",
    "Goal",
    "Intrude",
    "Misclassify",
    "Superclass",
    "SuperclassAll",
    "Targeted",
]
