"""`rv.attack`: what it returns, objects in place of specs, and mistakes told by the names of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustvlm as rv
from robustvlm.commands.attack.record import AttackedRun

QUICK: dict[str, Any] = {"attack": "pgd", "steps": 2, "limit": 6, "lanes": 4, "checks": "none", "device": "cpu"}


class Net(nn.Module):
    """A linear model of 101 classes."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 16 * 16, 101)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AttackedRun:
    out = tmp_path_factory.mktemp("runs")
    return rv.attack("tiny", data="emoji", eps="1/255,2/255", out=out, **QUICK)


def test_a_run_has_summary_rows_report_and_is_shown(run: AttackedRun, capsys: pytest.CaptureFixture[str]) -> None:
    at = run.summary.at("2/255")
    assert at is run.summary.at(2 / 255) is run.summary.per_eps[-1]
    table = run.rows.to_pandas()
    held = (table[table["eps"] == at.eps]["outcome"] == "robust").sum()
    assert at.robust_accuracy.successes == held
    assert len(table) == 2 * 6
    assert run.report.is_file()
    run.show()
    shown = capsys.readouterr().out
    assert "Worst case over the attacks (L∞, 6 images)" in shown
    assert str(run.report) in shown.replace("\n", "")
    with pytest.raises(rv.UserError, match="the run has no eps '3/255': did you mean '2/255'"):
        run.summary.at("3/255")
    again = rv.open_run(run.folder)
    assert again.rows.equals(run.rows)


def test_a_number_is_a_radius(tmp_path: Path, run: AttackedRun) -> None:
    one = rv.attack("tiny", eps=1 / 255, out=tmp_path, **QUICK)
    mine, theirs = one.summary.at(1 / 255), run.summary.at("1/255")
    assert mine.robust_accuracy == theirs.robust_accuracy
    assert one.manifest["config"]["eps"] == [1 / 255]


def test_objects_give_what_their_specs_give(tmp_path: Path, run: AttackedRun) -> None:
    data = rv.open_data("emoji")
    model = rv.load_classifier("tiny", data, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rv.attack(model, data=data, eps="1/255,2/255", out=tmp_path, **QUICK)
    assert found.rows.equals(run.rows)
    assert found.manifest["config"]["model"] == "tiny"
    assert found.manifest["data"] == run.manifest["data"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_is_named_by_its_class_and_known_by_its_weights(tmp_path: Path) -> None:
    data, other = rv.open_data("emoji"), Net()
    found = rv.attack(Net(), data=data, out=tmp_path, **QUICK)
    assert found.manifest["model"]["spec"] == f"{__name__}:Net"
    with torch.no_grad():
        other.linear.bias += 1.0
    assert rv.attack(other, data=data, out=tmp_path, **QUICK).name != found.name
    assert rv.attack(Net(), data=data, out=tmp_path, **QUICK).name == found.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": 3}, "model must be a spec, a classifier of `load_classifier` or a torch module, got a int"),
        ({"data": 7}, "data must be a spec, or a source of `open_data`, got a int"),
        ({"data": rv.open_data("emoji"), "tree": "x"}, "tree is for data that is named"),
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"min_cos": 2.0}, "min_cos must lie between -1 and 1, got 2"),
        ({"budget": "ten"}, "cannot read the budget 'ten'"),
        ({"eps": "1/255,1/255"}, "name each radius once"),
    ],
)
def test_mistakes_name_the_argument(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(rv.UserError, match=said):
        rv.attack(**{"out": tmp_path, **QUICK, **options})
    assert not any(tmp_path.iterdir())
