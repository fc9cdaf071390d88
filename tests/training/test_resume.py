"""A run that was killed and goes on ends where a straight one ends, to the bit; several ranks end where one does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robustvlm.errors import UserError
from robustvlm.training import Draws, Measure
from robustvlm.training.history import History
from robustvlm.training.state import BEST, LAST, read_checkpoint, write_checkpoint
from robustvlm.training.trainer import Diverged

from .toy import Toy, fit

TOY = Path(__file__).with_name("toy.py")
ROOT = TOY.parents[2]


def run(folder: Path, out: Path, *options: str, kill_at: int = 0, ranks: int = 1) -> None:
    """Train in a process of its own, killed once at a step, or in several."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *several, "-m", "tests.training.toy", str(folder), str(out), str(kill_at), *options]
    # Sums are in another order with another number of threads: as many as the straight run has in this process.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.equality
def test_killed_and_resumed_equals_straight_to_the_bit(tmp_path: Path) -> None:
    # In the middle of the fourth epoch, three steps after a checkpoint.
    run(tmp_path / "killed", tmp_path / "a", "dropout=1", kill_at=13)
    task, history = fit(tmp_path / "straight", task=Toy(dropout=0.3))
    assert same(load_file(tmp_path / "a"), dict(task.module.state_dict()))
    (parts, facts), (others, other) = (read_checkpoint(tmp_path / name / LAST) for name in ("killed", "straight"))
    assert all(same(parts[part], others[part]) for part in ("weights", "optimizer", "average"))
    timeless = {"steps", "validations", "best_step", "images", "passes"}
    assert {k: facts["history"][k] for k in timeless} == {k: other["history"][k] for k in timeless}
    assert history.best_step is not None
    assert same(*(read_checkpoint(tmp_path / name / BEST)[0]["weights"] for name in ("killed", "straight")))


def test_means_of_several_steps_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry spans four steps here; the checkpoint at 6 and the end at 7 lie inside of one."""
    monkeypatch.setattr("robustvlm.training.trainer._ENTRIES", 5)
    with pytest.raises(Diverged):
        fit(tmp_path / "killed", task=Exploding(), checkpoint_every=3)
    _, resumed = fit(tmp_path / "killed", checkpoint_every=3)
    _, straight = fit(tmp_path / "straight", checkpoint_every=100)
    assert [entry.step for entry in straight.steps] == [4, 8, 12, 16, 20, 24]
    assert resumed.steps == straight.steps
    assert resumed.validations == straight.validations


def test_best_weights_of_another_step_are_no_candidate(tmp_path: Path) -> None:
    """As after a kill between the two files: the history names one step, the stored weights are of another."""
    _, history = fit(tmp_path)
    parts, facts = read_checkpoint(tmp_path / LAST)
    kept, _ = read_checkpoint(tmp_path / BEST)
    write_checkpoint(tmp_path / BEST, kept, {"step": 999, "validation": None})
    write_checkpoint(tmp_path / LAST, parts, facts | {"step": 23})
    task, again = fit(tmp_path)
    assert history.best_step is not None
    assert again.best_step == 24  # the only one that was validated since
    assert same(dict(read_checkpoint(tmp_path / BEST)[0]["weights"]), dict(task.module.state_dict()))


def test_checkpoints_do_not_touch_the_weights(tmp_path: Path) -> None:
    often, rarely = (fit(tmp_path / str(every), checkpoint_every=every)[0] for every in (1, 100))
    assert same(dict(often.module.state_dict()), dict(rarely.module.state_dict()))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, history = fit(tmp_path)
    second, again = fit(tmp_path)
    assert again == history
    assert same(dict(first.module.state_dict()), dict(second.module.state_dict()))


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, steps=6)
    with pytest.raises(UserError, match="made with another settings: start over with fresh=True"):
        fit(tmp_path, steps=6, lr=0.02)


def test_parts_of_a_batch_add_up_to_it(tmp_path: Path) -> None:
    whole, parts = (fit(tmp_path / str(n), accumulate=n)[0].module.state_dict() for n in (1, 3))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.equality
@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    run(tmp_path / "two", tmp_path / "two.safetensors", "together=1", ranks=2)
    task, history = fit(tmp_path / "one", task=Toy(together=True))
    one, two = task.module.state_dict(), load_file(tmp_path / "two.safetensors")
    assert (one["1.0.weight"] - Toy().module.state_dict()["1.0.weight"]).abs().max() > 0.02
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    other = History.model_validate(read_checkpoint(tmp_path / "two" / LAST)[1]["history"])
    assert other.best_step == history.best_step
    for a, b in zip(other.steps, history.steps, strict=True):
        assert a.terms == pytest.approx(b.terms, rel=1e-4, abs=1e-5)


class Silent(Toy):
    """Its loss is infinite, its gradient is not."""

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        terms = super().losses(pixels, labels, step, draws)
        return terms | {"loss": terms["loss"] + (math.inf if step == 7 else 0.0)}


def test_an_infinite_loss_is_noticed_behind_finite_gradients(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"training diverged at step 8 \(loss inf.*; gradient norm \d"):
        fit(tmp_path, task=Silent())


class Lost(Toy):
    def validate(self) -> dict[str, Measure]:
        return super().validate() | {"feature spread": math.nan}


def test_measures_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="after step 0 the feature spread is not finite"):
        fit(tmp_path, task=Lost())


class Exploding(Toy):
    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        terms = super().losses(pixels, labels, step, draws)
        return terms | {"loss": terms["loss"] * (float("inf") if step == 7 else 1.0)}


def test_divergence_stops_with_the_last_good_checkpoint_kept(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"training diverged at step 8 \(loss inf"):
        fit(tmp_path, task=Exploding())
    parts, facts = read_checkpoint(tmp_path / LAST)
    assert facts["step"] == 6  # that of the best validation so far, written beside its weights
    assert all(value.isfinite().all() for value in parts["weights"].values())


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    fit(tmp_path, steps=6)
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"last.safetensors' is damaged .*start over with fresh=True"):
        fit(tmp_path, steps=6)


def test_a_module_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    task = Toy()
    task.module.requires_grad_(False)
    with pytest.raises(UserError, match="every parameter is frozen"):
        fit(tmp_path, task=task)
