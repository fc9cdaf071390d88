"""For every test, doctests too: random draws that no test seeds itself are the same in every run."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_draws_in_every_run() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    # What is imported and collected by now lives until the end: full collections, which statsmodels asks for at every
    # correction of p values, need not walk through it.
    gc.collect()
    gc.freeze()
