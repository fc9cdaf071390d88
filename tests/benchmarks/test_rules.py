"""Rows of ideal and deployed rules: resumed, judged beside another program in the published one's interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import rules
from benchmarks.cohen import Published, load_published
from robustvlm.certify.classes import vote_radius
from robustvlm.errors import UserError

# The interface that `benchmarks.cohen` expects, written anew: what it asks of torch and scipy, and its methods.
PEER = """
import torch
from scipy.stats import beta, binom_test, norm

class Smooth:
    def __init__(self, base, classes, sigma):
        self.base, self.classes, self.sigma = base, classes, sigma

    def certify(self, x, n0, n, alpha, batch_size):
        top = int(self._sample_noise(x, n0, batch_size).argmax())
        votes = int(self._sample_noise(x, n, batch_size)[top])
        share = beta.ppf(alpha, votes, n - votes + 1) if votes else 0.0
        return (-1, 0.0) if share < 0.5 else (top, {more} * self.sigma * norm.ppf(share))

    def predict(self, x, n, alpha, batch_size):
        counts = self._sample_noise(x, n, batch_size)
        second, first = counts.argsort()[-2:]
        return -1 if binom_test(counts[first], counts[first] + counts[second], p=0.5) > alpha else first

    def _sample_noise(self, x, num, batch_size):
        batch = x.repeat((num, 1, 1, 1))
        noisy = batch + torch.randn_like(batch, device="cuda") * self.sigma
        return torch.bincount(self.base(noisy).argmax(1), minlength=self.classes).numpy()
"""


def peer_in(folder: Path, more: float = 1.0) -> Path:
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "core.py").write_text(PEER.replace("{more}", str(more)))
    return folder


def published(folder: Path) -> Published:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3, 12))
    return Published(load_published(folder), model, 3, 0.25)


IMAGE = torch.zeros(3, 2, 2).index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(0.6))


def test_the_program_counts_votes_and_passes_of_our_model(tmp_path: Path) -> None:
    peer = published(peer_in(tmp_path))
    label, radius, votes = peer.certify(IMAGE, 50, 200, 0.001)
    assert (label, peer.passes) == (0, 250)
    assert radius == pytest.approx(vote_radius(votes, 200, 0.25, 0.001))
    said, counts = peer.predict(IMAGE, 40, 0.001)
    assert (said, int(counts.sum())) == (0, 40)
    assert not (tmp_path / "code" / "__pycache__").exists()


@pytest.mark.parametrize(("more", "radii_alike"), [(1.0, True), (1.1, False)])
def test_a_program_that_judges_votes_otherwise_is_noticed(tmp_path: Path, more: float, radii_alike: bool) -> None:
    options = rules.argparse.Namespace(samples=250, n0=40, alpha=0.001, answers=3)
    found = rules.theirs(published(peer_in(tmp_path, more)), IMAGE, options)
    assert (found["alike"] == found["judged"], found["judged"]) == (radii_alike, 4)
    assert (found["passes"], found["passes_answer"]) == (250, 40)


def test_what_is_no_copy_of_the_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no code/core\.py: clone"):
        load_published(tmp_path)
    (tmp_path / "core.py").write_text("")
    with pytest.raises(UserError, match="no class Smooth"):
        load_published(tmp_path)


def test_a_stopped_table_goes_on_and_has_a_row_for_each_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rules.jsonl"
    given = ["tiny", "--limit", "2", "--sigma", "0.03", "--samples", "80", "--n0", "12", "--answers", "2"]
    given += ["--peer", str(peer_in(tmp_path / "peer")), "--out", str(out)]
    assert rules.main(given) == 0
    whole = out.read_text()
    first, second = whole.splitlines()
    out.write_text(first + "\n" + second[:50])
    assert rules.main(given) == 0
    rows = rules.lines(out)
    timeless = [{**json.loads(second), "seconds": 0}, {**rows[1], "seconds": 0}]
    for row in timeless:
        row["cohen"] = {**row["cohen"], "seconds": 0}
    assert timeless[0] == timeless[1]
    assert [row["vote"]["passes"] for row in rows] == [80, 80]
    assert [row["mean"]["passes_answer"] for row in rows] == [12, 12]
    printed = capsys.readouterr().out
    assert "| tiny | 0.03 | vote, published program | 2 |" in printed
    assert "the same 6 of 6 times" in printed
    assert rules.main([*given[:-4], "--peer", str(tmp_path), "--out", str(out)]) == 2
    for changed in (["--answers", "3"], ["--data", "emoji?split=train"]):
        capsys.readouterr()
        assert rules.main([*given, *changed]) == 2
        assert f"was made with {changed[0][2:]} " in capsys.readouterr().err
    assert rules.lines(out) == rows
