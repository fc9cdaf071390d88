"""For every test, doctests too: random draws that no test seeds itself are the same in every run."""

from __future__ import annotations

import gc
import io
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from rich.cells import cell_len
from rich.console import Console

from robustvlm.report import screen
from robustvlm.report import sections as doc

# No test is timed: on a busy machine an example that takes 200 ms, hypothesis' own bound, is no fault of anybody.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _same_draws_in_every_run() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _coverage_is_measured_to_the_end() -> Iterator[None]:
    """Give a tracer back that a test's package took away, as pyautoattack does to look for dynamic defences."""
    tracer = sys.gettrace()
    yield
    if tracer is not None and sys.gettrace() is not tracer:
        sys.settrace(tracer)


def pytest_collection_finish() -> None:
    # What is imported and collected by now lives until the end: full collections, which statsmodels asks for at every
    # correction of p values, need not walk through it.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _tables_are_whole_at_80_columns() -> Iterator[None]:
    """Look at every table that any test shows in a terminal: at 80 columns no word, number or interval is broken."""
    make = screen.FittedTable.__init__

    def made(self: screen.FittedTable, table: doc.Table, *, heads: bool = True) -> None:
        make(self, table, heads=heads)
        stream = io.StringIO()
        Console(file=stream, width=80).print(self)
        lines = stream.getvalue().splitlines()
        assert max(cell_len(line.rstrip()) for line in lines) <= 80, table.title
        shown = {word for line in lines for word in line.split()}
        cells = [cell for row in self._rows if not isinstance(row, str) for cell in row]
        words = {word for cell in [*self._heads, *cells] for word in cell.plain.split() if cell_len(word) <= 36}
        assert words <= shown, f"broken in '{table.title}': {words - shown}"
        parts = [part for row in table.rows if not isinstance(row, str) for cell in row for part in doc.parts_of(cell)]
        measures = {screen.text(part).plain for part in parts if isinstance(part, doc.Measure)}
        assert not [measure for measure in measures if measure not in stream.getvalue()], table.title

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen.FittedTable, "__init__", made)
        yield
