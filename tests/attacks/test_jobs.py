"""Jobs take pixels in [0, 1] only; successes that are not final are counted, and so are those that hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import Curved, right_jobs

from robustvlm.attacks import PGD, Job, LaneEngine, Oracle, ThreatModel
from robustvlm.errors import UserError


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.rand(3, 4, 4) * 255, r"expected \[0, 1\]: divide 8-bit images by 255"),
        (torch.rand(3, 4, 4) * 2 - 1, r"expected \[0, 1\]"),
        (torch.full((3, 4, 4), 1.001), r"from 1\.001 to 1\.001"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "torch.uint8: divide 8-bit images by 255"),
    ],
)
def test_pixels_outside_their_range_are_refused(pixels, words):
    with pytest.raises(UserError, match=f"image 'cat' has pixels .*{words}"):
        Job("cat", 0, pixels, 1)


@given(st.floats(-(2.0**-17), 1 + 2.0**-17, width=32))
def test_what_rounding_leaves_outside_is_clipped(value):
    job = Job("cat", 0, torch.full((3, 2, 2), value), 1)
    assert 0 <= job.pixels.min() <= job.pixels.max() <= 1
    assert (job.pixels - value).abs().max() <= 1e-5


def test_pixels_inside_are_the_same_tensor():
    pixels = torch.rand(3, 4, 4)
    assert Job("cat", 0, pixels, 1).pixels is pixels


class RoughBelowFloat32(Curved):
    """Under autocast, as in bf16, it says the last class of everything."""

    def forward(self, x):
        logits = super().forward(x)
        if torch.is_autocast_cpu_enabled():
            return logits + 100 * torch.nn.functional.one_hot(torch.tensor(4), 5)
        return logits


def test_claims_that_full_precision_does_not_uphold_are_counted():
    jobs = [job for job in right_jobs(Curved()) if job.label != 4]
    engine = LaneEngine(
        Oracle(RoughBelowFloat32(), precision="bf16"), PGD(n_iter=3), ThreatModel("Linf", 1e-4), lanes=8, seed=0
    )
    assert {result.outcome for result in engine.run(jobs)} == {"robust"}
    assert engine.claimed >= len(jobs)
    assert engine.upheld == 0


def test_claims_that_hold_are_counted_too_and_final_answers_are_none():
    for precision in ("bf16", "fp32"):
        model = Curved()
        engine = LaneEngine(
            Oracle(model, precision=precision), PGD(n_iter=5), ThreatModel("Linf", 0.5), lanes=8, seed=0
        )
        fooled = sum(result.outcome == "fooled" for result in engine.run(right_jobs(model)))
        assert fooled
        assert engine.upheld == (fooled if precision == "bf16" else 0)
