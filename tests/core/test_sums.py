"""Recorded sums are the same to the bit for every layout, batch, stride and number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.attacks import ThreatModel, parse_attacks
from robustvlm.attacks.goals import Case, FeatureTo
from robustvlm.attacks.threat import perturbation_norms
from robustvlm.core.seeds import row_norms, row_sums, rows_times

# More values in a row than torch sums with one thread.
SIDE = 112


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def guises(row: Tensor) -> Iterator[Tensor]:
    """Yield batches whose first row has the values of an image [C, H, W], in every way that memory can hold it."""
    for others in (0, 1, 6):
        batch = torch.cat([row[None], torch.rand(others, *row.shape).to(row)])
        yield batch
        yield batch.to(memory_format=torch.channels_last)
        yield batch.transpose(2, 3).contiguous().transpose(2, 3)
        yield torch.stack([batch, batch], dim=-1)[..., 0]
        yield torch.cat([row.new_zeros(1, *row.shape), batch])[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2])
def test_a_sum_does_not_depend_on_how_memory_holds_the_row(dtype: torch.dtype, count: int) -> None:
    row = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=dtype) - 0.5
    sums, norms = row_sums(row[None]).item(), row_norms(row[None]).item()
    with threads(count):
        for batch in guises(row):
            assert row_sums(batch)[0].item() == sums
            assert row_norms(batch)[0].item() == norms
            assert perturbation_norms(batch[0], torch.zeros_like(row)) == perturbation_norms(row, torch.zeros_like(row))
    exact = math.fsum(row.double().flatten().tolist())
    assert sums == pytest.approx(exact, abs=1e-6 if dtype == torch.float64 else 0.05)


@given(st.lists(st.floats(-1e3, 1e3), max_size=40), st.integers(1, 3))
def test_a_sum_is_the_sum(values: list[float], rows: int) -> None:
    found = row_sums(torch.tensor([values] * rows, dtype=torch.float64).reshape(rows, len(values)))
    assert found.tolist() == pytest.approx([math.fsum(values)] * rows, abs=1e-9)


def test_a_row_times_a_matrix_does_not_depend_on_its_neighbours() -> None:
    rows, matrix = torch.randn(64, 512), torch.randn(100, 512)
    whole = rows_times(rows, matrix)
    assert torch.allclose(whole, rows @ matrix.T, atol=1e-3)
    for count in (0, 1, 2, 3, 8):
        assert torch.equal(rows_times(rows[:count], matrix), whole[:count])


def test_what_a_feature_goal_records_does_not_depend_on_the_batch() -> None:
    unit = torch.nn.functional.normalize(torch.randn(20, 512), dim=1)
    goal, case = FeatureTo(unit[0], unit[1:4], head=100 * unit[4:12]), Case(torch.arange(12) % 3)
    outputs = unit[8:]
    for count in (1, 2, 3, 8):
        for measured in (goal.confidence, lambda out: goal.margin(out, case.rows(torch.arange(len(out))))):
            assert torch.equal(measured(outputs[:count]), measured(outputs)[:count])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_a_step_of_an_attack_does_not_depend_on_the_batch_or_on_threads(name: str, norm: str) -> None:
    (attack,) = parse_attacks(name)
    threat = ThreatModel(norm, 0.03 if norm == "Linf" else 3.0)
    draws = torch.Generator().manual_seed(3)
    x0 = torch.rand(1, 3, SIDE, SIDE, generator=draws)
    state = attack.begin(x0, threat, draws, 0)
    grad, loss = torch.randn(x0.shape, generator=draws), torch.tensor([-0.4])

    def steps(copies: int, layout: torch.memory_format) -> Tensor:
        now = {key: torch.cat([value] * copies) for key, value in state.items()}
        pull, gain = torch.cat([grad] * copies).to(memory_format=layout), loss.repeat(copies)
        for step in range(3):
            now = {key: value.to(memory_format=layout) if value.ndim == 4 else value for key, value in now.items()}
            now = attack.advance(now, gain, pull, torch.full((copies,), step), threat)
        return now["x"][0]

    straight = steps(1, torch.contiguous_format)
    for copies, layout in ((1, torch.channels_last), (5, torch.contiguous_format), (4, torch.channels_last)):
        with threads(1 + copies % 2):
            assert torch.equal(steps(copies, layout), straight)
    with threads(2):
        assert torch.equal(steps(1, torch.contiguous_format), straight)
