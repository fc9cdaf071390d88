"""A majority that is decided is not drawn on: the same verdicts as by all draws, at fewer passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Case, Misclassify
from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.tensors import ask_unperturbed


class Scripted(nn.Module):
    """Rows tell by their pixels who they are, and each gets its own next word from a table [rows, draws]."""

    def __init__(self, wrong: Tensor) -> None:
        super().__init__()
        self.wrong, self.asked = wrong, torch.zeros(len(wrong), dtype=torch.int64)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = (pixels[:, 0, 0, 0] * len(self.wrong)).long()
        said = self.wrong[rows, self.asked[rows]]
        self.asked[rows] += 1
        return torch.stack([~said, said], dim=1).float() * (1 + rows[:, None])


def scripted(draws: int, rows: int = 60) -> tuple[Scripted, Tensor, Case]:
    generator = torch.Generator().manual_seed(draws)
    chance = torch.rand(rows, 1, generator=generator)
    x = ((torch.arange(rows) + 0.5) / rows).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return (
        Scripted(torch.rand(rows, draws, generator=generator) < chance),
        x,
        Case(torch.zeros(rows, dtype=torch.int64)),
    )


def test_verdicts_are_those_of_all_draws() -> None:
    for draws in (1, 2, 5, 21):
        model, x, case = scripted(draws)
        found = Oracle(model, draws=draws, brisk=True).judge(x, Misclassify(), case)
        wrong = model.wrong.sum(1)
        assert torch.equal(found.reached, 2 * wrong > draws)
        assert torch.equal(found.prediction, found.reached.long())
        # Each row is drawn on until its majority is decided, and no further; an even number leaves room for a tie.
        for row, words in enumerate(model.wrong.tolist()):
            needed = next(
                n for n in range(1, draws + 1) if n == draws or 2 * max(sum(words[:n]), n - sum(words[:n])) > draws
            )
            assert model.asked[row] == max(needed, draws // 2 + 1)
    assert model.asked.sum() < 0.9 * model.wrong.numel()


def test_clean_images_are_asked_until_all_are_decided() -> None:
    model, x, case = scripted(21)
    slow = Oracle(Scripted(model.wrong), draws=21)
    found = ask_unperturbed(Oracle(model, draws=21, brisk=True), Misclassify(), x, case.label)
    assert torch.equal(found.answer.reached, ask_unperturbed(slow, Misclassify(), x, case.label).answer.reached)
    easy = Scripted(torch.zeros(60, 21, dtype=torch.bool))
    ask_unperturbed(Oracle(easy, draws=21, brisk=True), Misclassify(), x, case.label)
    assert (easy.asked == 11).all()
