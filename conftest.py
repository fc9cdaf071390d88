"""For every test, doctests too: random draws that no test seeds itself are the same in every run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws_in_every_run() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
