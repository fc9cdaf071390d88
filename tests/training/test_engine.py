"""The parts of the engine against closed forms: schedule, average, optimiser, settings, warnings, validation, cost."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.data import open_data
from robustvlm.errors import UserError
from robustvlm.stats import rate
from robustvlm.training import Draws, LabelledImages, RobustValidation, Trainer, TrainingConfig, Validation
from robustvlm.training.history import warnings_of
from robustvlm.training.state import Average, Weights, make_optimizer
from robustvlm.training.trainer import learning_rate

from .toy import SIDE, Toy, config, fit, images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "either in steps or in epochs"),
        ({"steps": None}, "either in steps or in epochs"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": math.nan}, "lr must be a positive number"),
        ({"ema": 1.0}, "must lie between 0 and 1, got 1.0"),
        ({"precision": "fp16"}, "unknown precision 'fp16': did you mean"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"warmup": math.nan}, "warmup must not be negative, and must be finite, got nan"),
        ({"validate_every": math.inf}, "validate_every must not be negative, and must be finite, got inf"),
        ({"clip": -1.0}, "clip must be a positive number"),
    ],
)
def test_settings_out_of_range_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**options)


def test_a_batch_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch size 12 cannot be cut into 1 process\(es\) x 5 part\(s\)"):
        Trainer(Toy(), images(), config(accumulate=5))


def test_the_schedule_rises_and_falls() -> None:
    rates = [learning_rate(s, total=100, peak=2.0, warmup=10, final=0.1) for s in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = Average(Weights(layer), decay=0.5)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average.values["weight"].fill_(1.0)
        wanted = 1.0
        for step in range(1, 30):
            layer.weight.fill_(float(step))
            average.update(step)
            keep = min(0.5, (1 + step) / (10 + step))
            wanted = keep * wanted + (1 - keep) * step
    assert average.values["weight"].item() == pytest.approx(wanted)


def test_vectors_are_not_decayed() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    groups = make_optimizer(Weights(module), TrainingConfig(steps=1, weight_decay=0.3)).param_groups
    assert {g["weight_decay"]: sorted(p.ndim for p in g["params"]) for g in groups} == {0.3: [4], 0.0: [1, 1, 1]}


def test_one_step_is_torch_s_own(tmp_path: Path) -> None:
    """A second implementation: the same batch, loss, clipping and AdamW written out."""
    settings = {"steps": 1, "ema": None, "warmup": 0, "clip": 0.05, "lr": 0.01, "weight_decay": 0.1}
    task, history = fit(tmp_path, **settings)
    other = Toy()
    other.train_mode()
    batch = next(iter(images().batches([range(12)])))
    losses = other.losses(batch.pixels, batch.labels, 0, Draws(5, 0, batch.ids))
    parameters = dict(other.module.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in parameters.values()],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), 0.05)
    optimizer.step()
    for name, value in other.module.state_dict().items():
        torch.testing.assert_close(task.module.state_dict()[name], value)
    assert history.steps[-1].terms["loss"] == pytest.approx(losses["loss"].item(), rel=1e-6)
    assert history.steps[-1].gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    scores = iter([0.9, 0.0, 0.8, 0.8, 0.0])
    seen: list[Tensor] = []
    task = Toy()

    def validation() -> dict[str, float]:
        seen.append(task.module[1][0].weight.detach().clone())
        return {"score": next(scores)}

    settings = config(ema=None, steps=12, validate_every=3)
    history = Trainer(task, images(), settings, validation=validation, best_by="score").fit(tmp_path)
    assert history.best_step == 6
    assert torch.equal(task.module[1][0].weight, seen[2])
    assert [found.number("score") for found in history.validations] == [0.9, 0.0, 0.8, 0.8, 0.0]


def test_of_weights_that_withstand_as_much_those_with_more_right_clean_are_kept(tmp_path):
    clean = iter([0.9, 0.1, 0.7, 0.7])
    history = Trainer(
        Toy(), images(), config(steps=6, validate_every=2),
        validation=lambda: {"score": 0.0, "clean accuracy": next(clean)}, best_by="score",
    ).fit(tmp_path)  # fmt: skip
    assert [found.number("clean accuracy") for found in history.validations] == [0.9, 0.1, 0.7, 0.7]
    assert history.best_step == 4, "the untrained weights are no candidate, and of equals the earlier are kept"


def test_of_equally_good_weights_the_first_are_kept(tmp_path: Path) -> None:
    history = Trainer(
        Toy(), images(), config(steps=6, validate_every=2), validation=lambda: {"score": 0.0}, best_by="score"
    ).fit(tmp_path)
    assert history.best_step == 2


def test_images_passes_and_estimate_are_counted(tmp_path: Path) -> None:
    class Attacked(Toy):
        def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
            x = pixels.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.module(x), labels), x)
            return super().losses((x + 0.1 * gradient.sign()).detach(), labels, step, draws)

    _, history = fit(tmp_path, task=Attacked(), steps=10)
    assert history.images == 120
    # Forward and backward of the attack, and of the step itself.
    assert history.passes == 4 * 120
    assert history.estimate is not None
    assert (history.estimate.steps, history.estimate.passes) == (10, 480)
    assert history.peak_memory > 0


class Looking(Toy):
    """Notes in which precision it is asked for losses."""

    seen: set[tuple[bool, torch.dtype]]

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        self.seen = getattr(self, "seen", set()) | {(torch.is_autocast_cpu_enabled(), pixels.dtype)}
        return super().losses(pixels, labels, step, draws)


def test_bf16_trains_under_autocast_with_float32_weights_and_images(tmp_path: Path) -> None:
    task, history = fit(tmp_path, task=Looking(), precision="bf16")
    assert isinstance(task, Looking)
    assert task.seen == {(True, torch.float32)}
    assert {value.dtype for value in task.module.parameters()} == {torch.float32}
    assert history.steps[-1].terms["loss"] < history.steps[0].terms["loss"]


def series(
    name: str, values: list[float], *, losses: list[float] | None = None, **others: list[float]
) -> list[Validation]:
    columns = {name: values, **{key.replace("_", " "): column for key, column in others.items()}}
    return [
        Validation(
            step=10 * i,
            measures={
                key: column[i] if key == "feature spread" else rate(round(400 * column[i]), 400)
                for key, column in columns.items()
            },
            train_loss=None if i == 0 or losses is None else losses[i - 1],
        )
        for i in range(len(values))
    ]


def test_too_few_images_do_not_warn() -> None:
    odd = {"FGSM accuracy": rate(1, 40), "robust accuracy": rate(20, 40), "noise accuracy": rate(20, 40)}
    assert warnings_of([Validation(step=1, measures=odd)]) == []


@pytest.mark.parametrize(
    ("validations", "names"),
    [
        (series("robust accuracy", [0.1, 0.5, 0.6], FGSM_accuracy=[0.2, 0.55, 0.65]), []),
        (series("robust accuracy", [0.1, 0.5], FGSM_accuracy=[0.2, 0.4]), ["gradient masking"]),
        (series("robust accuracy", [0.1, 0.5], noise_accuracy=[0.6, 0.504]), ["useless gradients"]),
        (series("robust accuracy", [0.1, 0.5, 0.1], FGSM_accuracy=[0.2, 0.6, 0.8]), ["catastrophic overfitting"]),
        (series("robust accuracy", [0.1, 0.5, 0.4, 0.4], losses=[1.0, 0.8, 0.6]), ["robust overfitting"]),
        (series("robust accuracy", [0.1, 0.5, 0.4, 0.4], losses=[1.0, 1.2, 1.4]), []),
        (series("robust accuracy", [0.1, 0.5, 0.4, 0.49], losses=[1.0, 0.8, 0.6]), []),
        (series("feature spread", [0.5, 0.4]), []),
        (series("feature spread", [0.5, 0.02]), ["constant features"]),
        (series("clean accuracy", [0.9, 0.2]), ["collapse"]),
        (series("clean accuracy", [0.9, 0.5]), []),
    ],
)
def test_warnings(validations: list[Validation], names: list[str]) -> None:
    assert [warning.name for warning in warnings_of(validations)] == names


def test_a_linear_classifier_is_validated_in_closed_form() -> None:
    """Under Linf the margin of a linear model falls by eps times the L1 norm of the difference of its rows."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 2))
    pixels = torch.randint(64, 192, (120, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 3 * SIDE**2, generator=generator))
        model[1].bias.zero_()
        logits = model(pixels.float() / 255)
        labels = logits.argmax(1)
        labels[::7] = 1 - labels[::7]
        margins = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    eps = 0.05
    reach = eps * (model[1].weight[0] - model[1].weight[1]).abs().sum()
    held = LabelledImages(pixels, labels, tuple(map(str, range(120))))
    found = RobustValidation(held, ThreatModel("Linf", eps), n_iter=5, batch_size=32).measure(model)
    assert found["clean accuracy"] == rate(int((margins > 0).sum()), 120)
    assert found["robust accuracy"] == found["FGSM accuracy"] == rate(int((margins > reach).sum()), 120)
    assert found["robust accuracy"].value < found["noise accuracy"].value <= found["clean accuracy"].value
    steep = RobustValidation(held, ThreatModel("L2", 1.0), n_iter=5).measure(model)
    beyond = (model[1].weight[0] - model[1].weight[1]).norm()
    assert steep["robust accuracy"] == rate(int((margins > beyond).sum()), 120)


def test_robust_validation_needs_a_step_of_pgd() -> None:
    held = LabelledImages(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    with pytest.raises(UserError, match=r"at least 1 step of PGD \(val_steps\), got 0"):
        RobustValidation(held, ThreatModel("Linf", 0.1), n_iter=0)


def test_copies_count_once_in_the_intervals_of_a_validation() -> None:
    held = LabelledImages(
        torch.zeros(12, 3, 2, 2, dtype=torch.uint8), torch.arange(12) // 8, tuple("abcdefghijkl"), tuple("aaaabbbbcccc")
    )
    assert held.worth == 3
    logits = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.zeros_(logits[1].weight)
    nn.init.zeros_(logits[1].bias)  # every image is of the first class
    found = RobustValidation(held, ThreatModel("Linf", 0.1), n_iter=1).measure(logits)
    assert all(measure == rate(8, 12, independent=3) for measure in found.values())
    drawings = LabelledImages.read(open_data("emoji?split=val&copies=2"), size=64, limit=20)
    assert len(drawings.groups) == 20
    assert drawings.worth < 20


def test_what_is_not_a_number_is_not_right() -> None:
    held = LabelledImages(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), tuple("abc"))
    found = RobustValidation(held, ThreatModel("Linf", 0.1), n_iter=1).measure(
        lambda pixels: pixels.flatten(1)[:, :2] * math.nan
    )
    assert {name: measure.value for name, measure in found.items()} == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("ranks", [2, 5])
def test_shares_of_a_validation_add_up_even_if_there_are_fewer_images_than_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    pixels = torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    held = LabelledImages(pixels, torch.tensor([0, 1, 0]), tuple("abc"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    validation = RobustValidation(held, ThreatModel("Linf", 0.05), n_iter=2)
    whole = validation.measure(model)
    counts = dict.fromkeys(whole, 0)
    for rank in range(ranks):
        monkeypatch.setattr("robustvlm.training.validation.rank_and_size", lambda rank=rank: (rank, ranks))
        for name, found in validation.measure(model).items():
            counts[name] += found.successes
    assert counts == {name: found.successes for name, found in whole.items()}
