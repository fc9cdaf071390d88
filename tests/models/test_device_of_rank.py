"""Every process of a job gets a GPU of its own, or one line on why it cannot."""

from __future__ import annotations

import pytest
import torch

from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError
from robustvlm.models.device import device_of_rank

CUDA = torch.device("cuda")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that there are two GPUs; return the list of those made current."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def test_the_local_rank_chooses_the_gpu_and_the_name_stays_that_of_all(chosen: list[int]) -> None:
    assert device_of_rank(CUDA, Ranks(rank=5, size=8, local_rank=1)) == CUDA
    assert chosen == [1]


def test_a_process_on_its_own_keeps_its_device(chosen: list[int]) -> None:
    assert device_of_rank(torch.device("cuda:1"), Ranks()) == torch.device("cuda:1")
    assert device_of_rank(torch.device("cpu"), Ranks(1, 2, 1)) == torch.device("cpu")
    assert chosen == []


def test_one_gpu_for_all_or_too_few_of_them_are_refused(chosen: list[int]) -> None:
    with pytest.raises(UserError, match="'cuda:0' would be the GPU of all 2 processes: pass --device cuda"):
        device_of_rank(torch.device("cuda:0"), Ranks(1, 2, 1))
    with pytest.raises(
        UserError, match="process 2 of this machine has no GPU, torch sees 2: start one process per GPU"
    ):
        device_of_rank(CUDA, Ranks(2, 3, 2))
    assert chosen == []
