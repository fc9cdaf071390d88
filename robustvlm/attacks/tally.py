"""Answers: what the model says at a batch of points, summed up over the draws of a random model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.goals import Case, Goal


@dataclass(frozen=True)
class Answer:
    """What the model says at a batch of points, measured by a goal; over the model's draws where it is random.

    Args:
        reached: the goal is reached, in more than half of the draws; bool [B].
        margin: distance from the goal, the largest over the draws, [B]: a point is as good as its worst draw.
        prediction: predicted class, the most frequent among the draws that decided; int64 [B], -1 = rejected.
        confidence: softmax probability of the leading class, mean over the draws, [B].
        finite: all of the model's output is finite; bool [B].
        cosine: the cosine that a feature goal is about, mean over the draws, [B]; NaN for other goals.
    """

    reached: Tensor
    margin: Tensor
    prediction: Tensor
    confidence: Tensor
    finite: Tensor
    cosine: Tensor

    @classmethod
    def join(cls, answers: Sequence[Answer]) -> Answer:
        """Return the rows of several answers as one."""
        return cls(*(torch.cat([getattr(answer, name) for answer in answers]) for name in cls.__dataclass_fields__))

    def head(self, rows: int) -> Answer:
        """Return the first rows."""
        return Answer(*(getattr(self, name)[:rows] for name in self.__dataclass_fields__))

    def replaced(self, rows: Tensor, other: Answer) -> Answer:
        """Return these answers with those of some rows replaced."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Answer(*(mine.index_copy(0, rows, theirs) for mine, theirs in pairs))


class Tally:
    """Sums up outputs [B, O] draw by draw; memory does not grow with the number of draws but by a class each.

    Example:
        >>> from robustvlm.attacks.goals import Misclassify
        >>> tally = Tally(Misclassify(), Case(torch.tensor([0])), 1, torch.device("cpu"))
        >>> for logits in ([[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]):
        ...     tally.add(torch.tensor(logits))
        >>> tally.answer().reached.item(), tally.answer().margin.item(), tally.answer().prediction.item()
        (True, 1.0, 1)
    """

    def __init__(self, goal: Goal, case: Case, rows: int, device: torch.device) -> None:
        self.goal, self.case = goal, case
        self.votes = torch.zeros(rows, dtype=torch.int64, device=device)
        self.margin = torch.full((rows,), float("-inf"), device=device)
        self.confidence = torch.zeros(rows, dtype=torch.float64, device=device)
        self.cosine = torch.zeros(rows, dtype=torch.float64, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)
        self.reached: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def add(self, output: Tensor) -> None:
        """Take in the output of one draw."""
        reached, margin = self.goal.reached(output, self.case), self.goal.margin(output, self.case)
        cosine = self.goal.cosine(output, self.case)
        self.votes = self.votes + reached
        self.margin = torch.maximum(self.margin.to(margin.dtype), margin)
        self.confidence = self.confidence + self.goal.confidence(output)
        self.cosine = self.cosine + (float("nan") if cosine is None else cosine.double())
        self.finite = self.finite & output.isfinite().all(1)
        self.reached.append(reached)
        self.predictions.append(self.goal.prediction(output))

    def answer(self) -> Answer:
        """Return the answers over all draws so far."""
        n = len(self.predictions)
        reached = 2 * self.votes > n
        return Answer(
            reached=reached,
            margin=self.margin,
            prediction=self.predictions[0] if n == 1 else self._leading(reached),
            confidence=self.confidence / n,
            finite=self.finite,
            cosine=self.cosine / n,
        )

    def _leading(self, reached: Tensor) -> Tensor:
        """Return each row's most frequent prediction among the draws on the winning side."""
        predictions, sides = torch.stack(self.predictions), torch.stack(self.reached)
        rows = []
        for row in range(predictions.shape[1]):
            side = predictions[:, row][sides[:, row] == reached[row]]
            rows.append(side.mode().values if len(side) else predictions[0, row])
        return torch.stack(rows)
