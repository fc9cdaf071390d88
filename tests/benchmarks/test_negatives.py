"""The benchmarks of KR-NFT: classes left out choose to learn where that helps, and not where it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.immunity import negatives
from benchmarks.immunity.negatives import Crops, chosen
from robustvlm.defenses.prompts import Features
from robustvlm.detect import KRNFT, Head, NegLabel


def drawn(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_crops_are_labelled_by_the_classes_that_stay() -> None:
    every = ("a", "b", "c")
    crops = Crops(drawn(4, 2, 3, seed=0), torch.tensor([2, 0, 1, 2]))
    some = crops.among(("c", "a"), every)
    assert some.labels.tolist() == [0, 1, 0]
    assert torch.equal(some.features, crops.features[[0, 1, 3]])


@pytest.mark.parametrize("lr", [1e-12, 3e-3])
def test_nothing_is_learnt_where_no_setting_gains(monkeypatch: pytest.MonkeyPatch, lr: float) -> None:
    """Nothing can gain at no rate to speak of. At a real one, images turned away from their texts are turned back."""
    monkeypatch.setattr(negatives, "GRID", {"lr": (lr,), "negative_weight": (0.0,)})
    texts = drawn(9, 32, seed=1)
    away = 1.5 * drawn(1, 32, seed=2)
    labels = torch.arange(9).repeat(6)
    images = F.normalize(texts[labels] + away + 0.4 * drawn(54, 32, seed=3), dim=1)
    words = F.normalize(drawn(12, 32, seed=4) + 0.7 * away, dim=1)  # as near to all images as these to their texts
    start = KRNFT(NegLabel(Head(texts, 20.0), words), hidden=0)
    names = tuple(f"{k}" for k in range(54))
    held = Features(images[27:], labels[27:], names[27:], names[27:])
    found = chosen(start, Crops(images[:27, None], labels[:27]), held, seed=0)
    assert (found.epochs, found.lr) == ((0, start.lr) if lr < 1e-6 else (start.epochs, lr))
