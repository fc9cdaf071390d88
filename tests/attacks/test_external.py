"""The published packages as attacks of a run: every class they offer, their traps, and the judging of their points."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from toy import Curved, Linear, images, right_jobs

from robustvlm.attacks import (
    FAILED,
    FOOLED,
    AcceptedMistake,
    Deny,
    Job,
    Misclassify,
    Oracle,
    Result,
    ThreatModel,
    external_engine,
    parse_attacks,
)
from robustvlm.attacks.catalog import is_external
from robustvlm.attacks.external import SINGLE, TORCHATTACKS, UNBOUNDED, VERSIONS, parse_external, require_fit
from robustvlm.attacks.external_engine import ExternalEngine
from robustvlm.errors import UserError

BALLS = {"Linf": ThreatModel("Linf", 0.1), "L2": ThreatModel("L2", 1.0)}
QUICK = {"SPSA": ":nb_iter=2:nb_sample=8", "Square": ":n_queries=10", "AutoAttack": ":version=rand", "FGSM": ""}


def run(
    spec: str, model: nn.Module, jobs: list[Job], ball: ThreatModel = BALLS["Linf"], *, lanes: int = 4, seed: int = 0
) -> tuple[list[Result], ExternalEngine]:
    made = ExternalEngine(Oracle(model), parse_external(spec), ball, lanes=lanes, seed=seed)
    return list(made.run(jobs)), made


def quick(kind: str) -> str:
    return f"torchattacks:{kind}" + QUICK.get(kind, "")


@pytest.mark.parametrize(("kind", "norm"), [(kind, norm) for kind, norms in TORCHATTACKS.items() for norm in norms])
def test_every_class_of_torchattacks_runs_in_silence_and_stays_in_its_ball(
    kind: str, norm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Curved()
    jobs = right_jobs(model, 5)
    before = torch.random.get_rng_state()
    results, _ = run(quick(kind), model, jobs, BALLS[norm])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert [result.job.index for result in results] == list(range(5))
    for result in results:
        size = result.linf if norm == "Linf" else result.l2
        assert size <= BALLS[norm].eps
        assert result.adversarial.min() >= 0
        assert result.adversarial.max() <= 1
        predicted = int(model(result.adversarial[None]).argmax())
        assert (result.prediction, result.outcome == FOOLED) == (predicted, predicted != result.job.label)


@pytest.mark.parametrize("kind", [*VERSIONS, *SINGLE])
def test_every_version_and_part_of_autoattack(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    trace = sys.gettrace()
    results, made = run(f"autoattack:{kind}:steps=3:queries=5", Curved(), right_jobs(Curved(), 6))
    assert len(results) == 6
    assert any(result.outcome == FOOLED for result in results)
    assert capfd.readouterr() == ("", "")
    assert sys.gettrace() is trace
    assert not any(finding.level == "warning" for finding in made.findings)


def test_the_list_of_classes_is_that_of_the_package() -> None:
    assert {*TORCHATTACKS, *UNBOUNDED} == set(torchattacks.__all__)


def test_fgsm_gives_the_points_of_a_direct_call() -> None:
    model = Curved()
    jobs = right_jobs(model, 8)
    x, y = torch.stack([job.pixels for job in jobs]), torch.tensor([job.label for job in jobs])
    direct = torchattacks.FGSM(model.eval(), eps=0.1)(x, y)
    results, _ = run("torchattacks:fgsm", model, jobs, lanes=8)
    found = torch.stack([result.adversarial for result in results])
    # Our points may be a float nearer, where rounding had carried theirs over the edge.
    torch.testing.assert_close(found, direct, rtol=0, atol=1e-7)


def test_passes_are_counted_in_full_and_shared_out() -> None:
    oracle = Oracle(Curved())
    made = ExternalEngine(oracle, parse_external("torchattacks:PGD:steps=5"), BALLS["Linf"], lanes=3, seed=0)
    results = list(made.run(right_jobs(Curved(), 6)))
    # Six images, five steps, one judgement each; one question for the number of classes.
    assert (oracle.passes.forward, oracle.passes.backward) == (6 * 5 + 6 + 1, 6 * 5)
    assert sum(result.passes for result in results) == oracle.passes.forward + oracle.passes.backward
    assert all(result.steps == 5 for result in results)
    assert 0 < oracle.passes.seconds <= sum(result.seconds for result in results)


def test_repeated_runs_repeat_their_answers_and_seeds_differ() -> None:
    jobs = right_jobs(Curved(), 6)
    first, again, other = (run("torchattacks:PGD:steps=1", Curved(), jobs, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a.adversarial, b.adversarial) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.adversarial, b.adversarial) for a, b in zip(first, other, strict=True))


class Normed(Linear):
    """Has layers that training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(self.norm(x)))


def test_the_model_stays_in_evaluation_mode_and_learns_nothing() -> None:
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run("torchattacks:PGD", model, right_jobs(model.eval(), 4))
    run("autoattack:apgd-ce:steps=3", model, right_jobs(model, 4))
    assert not model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (lambda x: x + 0.2, "lay outside the ball, by up to"),
        (lambda x: x * 0 - 0.05, "lay outside the ball"),
        (lambda x: x * float("nan"), "were not finite"),
    ],
)
def test_points_that_break_the_rules_are_mended_and_told(monkeypatch: pytest.MonkeyPatch, points, said) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(external_engine, "program", lambda *_: lambda x, *_: points(x))
    results, made = run("torchattacks:PGD", Linear(), right_jobs(Linear(), 5))
    (finding,) = made.findings
    assert said in finding.message
    assert all(result.linf <= 0.1 and result.adversarial.isfinite().all() for result in results)


def test_rounding_is_mended_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_engine, "program", lambda *_: lambda x, *_: (x + 0.1 * (1 + 1e-6)).clamp(0, 1))
    results, made = run("torchattacks:PGD", Linear(), right_jobs(Linear(), 5))
    assert made.findings == []
    assert all(result.linf <= 0.1 for result in results)


def test_output_that_is_not_finite_fails_the_image() -> None:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.where(x.flatten(1)[:, :1] > 0.5, torch.nan, 1.0)

    jobs = [Job("a", 0, torch.full((3, 6, 6), 0.9), 0), Job("b", 1, torch.zeros(3, 6, 6), 0)]
    results, _ = run("torchattacks:PGD:steps=1:random_start=false", Broken(), jobs)
    assert [result.outcome == FAILED for result in results] == [True, False]
    assert results[0].prediction == -1


def test_too_little_memory_halves_the_batch() -> None:
    class Small(Curved):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise RuntimeError("CUDA out of memory")
            return super().forward(x)

    results, made = run("torchattacks:PGD:steps=2", Small(), right_jobs(Curved(), 7), lanes=8)
    assert [result.job.index for result in results] == list(range(7))
    assert made.rungs == (2,)


def test_failures_inside_a_package_are_one_line_that_names_it() -> None:
    with pytest.raises(UserError, match=r"'torchattacks:UPGD:loss=nonsense' failed inside its package") as caught:
        run("torchattacks:UPGD:loss=nonsense", Curved(), right_jobs(Curved(), 2))
    assert "\n" not in str(caught.value)


def test_warnings_of_autoattack_become_findings() -> None:
    class Softmax(Curved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    _, made = run("autoattack:apgd-ce:steps=2", Softmax(), right_jobs(Curved(), 3))
    assert any("probability distribution" in finding.message for finding in made.findings)
    assert logging.getLogger("auto-attack").handlers == []


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    model = Curved(classes)
    jobs = right_jobs(model, 3)
    for spec in ("autoattack", "autoattack:plus", "autoattack:apgd-t", "torchattacks:APGDT", "torchattacks:AutoAttack"):
        with pytest.raises(UserError, match=r"needs at least 4 classes, here are \d .* take our own apgd-ce"):
            run(spec, model, jobs)
    for spec in ("autoattack:apgd-ce:steps=2", "autoattack:fab-t:steps=2", "autoattack:square:queries=3"):
        assert len(run(spec, model, jobs)[0]) == 3
    if classes == 2:
        with pytest.raises(UserError, match="needs at least 3 classes"):
            run("autoattack:rand:steps=2", model, jobs)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchattacks", "names no attack"),
        ("torchattacks:", "names no attack"),
        ("torchattacks:PGDD", r"did you mean .*'PGD'"),
        ("torchattacks:CW", "smallest change instead of keeping inside eps"),
        ("torchattacks:OnePixel", "few pixels"),
        ("torchattacks:MultiAttack", "no attack inside a ball"),
        ("torchattacks:PGD:eps=0.1", "the ball comes from --norm and --eps"),
        ("torchattacks:PGD:step=3", "one of alpha, steps, random_start"),
        ("torchattacks:PGD:steps", "expected key=value"),
        ("torchattacks:PGD:steps=many", "expected a number, got 'many'"),
        ("torchattacks:PGD:alpha=1/0", "expected a number"),
        ("torchattacks:PGD:random_start=maybe", "expected true or false"),
        ("autoattack:standart", "did you mean 'standard'"),
        ("autoattack:square:n=5", "one of steps, restarts, targets, queries"),
        ("autoattack:steps=0", "steps must be at least 1"),
    ],
)
def test_mistakes_in_names(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_external(spec)


def test_settings_of_the_run_apply_where_the_name_states_none() -> None:
    assert parse_external("torchattacks:PGD", steps=7, restarts=2).settings == {"steps": 7}
    assert parse_external("torchattacks:APGD:steps=3", steps=7, restarts=2).settings == {"steps": 3, "n_restarts": 2}
    assert parse_external("autoattack", steps=7).settings == {"steps": 7}
    assert parse_external("torchattacks:PGD:alpha=2/255").settings == {"alpha": 2 / 255}


def test_names_of_ours_are_not_external() -> None:
    assert not any(map(is_external, ("pgd", "apgd-ce:steps=3", "square", "fab-t")))


def test_norm_and_goal_must_fit() -> None:
    with pytest.raises(UserError, match=r"knows only L2 balls: take --norm L2, or for Linf one of .*PGD"):
        require_fit(parse_external("torchattacks:PGDL2"), BALLS["Linf"], n_classes=5, goal=Misclassify())
    for goal, said in ((Deny(), "not 'deny'"), (AcceptedMistake(), "not of a model that may refuse")):
        with pytest.raises(UserError, match=said):
            require_fit(parse_external("autoattack"), BALLS["Linf"], n_classes=5, goal=goal)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UserError, match=r"pip install 'robustvlm\[external\]'"):
        parse_external("torchattacks:PGD")


class Enough(Exception):
    """Raised when a test's allowance is used up."""


@pytest.mark.parametrize("spec", ["torchattacks:PGD", "autoattack:apgd-ce:steps=5"])
def test_what_permission_raises_ends_the_run_as_it_is(spec: str) -> None:
    oracle = Oracle(Curved())

    def permit(passes: int) -> None:
        if oracle.passes.forward + oracle.passes.backward + passes > 50:
            raise Enough

    made = ExternalEngine(oracle, parse_external(spec), BALLS["Linf"], lanes=4, seed=0, permit=permit)
    with pytest.raises(Enough):
        list(made.run(right_jobs(Curved(), 8)))
    assert oracle.passes.forward + oracle.passes.backward <= 50


def test_no_jobs() -> None:
    assert run("torchattacks:PGD", Curved(), [])[0] == []


def test_a_fooled_image_of_a_direct_attack_is_fooled_here() -> None:
    """On a linear model the best Linf attack is known: it moves every pixel by eps against the margin."""
    model = Linear()
    x = images(12)
    jobs = right_jobs(model, 12)
    results, _ = run("autoattack:steps=20:queries=20", model, jobs, lanes=12)
    weight = model.layer.weight.detach()
    for job, result in zip(jobs, results, strict=True):
        best = False
        for other in set(range(4)) - {job.label}:
            step = 0.1 * (weight[other] - weight[job.label]).sign().view(3, 6, 6)
            logits = model((x[job.index] + step).clamp(0, 1)[None])[0]
            best |= bool(logits[other] > logits[job.label])
        assert (result.outcome == FOOLED) == best


def test_lists_of_attacks_hold_both_kinds() -> None:
    attacks = parse_attacks("apgd-ce,torchattacks:PGD:alpha=0.1,autoattack:square", steps=9)
    assert [attack.name for attack in attacks] == ["apgd-ce", "torchattacks:PGD:alpha=0.1", "autoattack:square"]
    assert attacks[1].settings == {"steps": 9, "alpha": 0.1}
    with pytest.raises(UserError, match="stands twice"):
        parse_attacks("autoattack,autoattack")


class OftenWrong(nn.Module):
    """Wrong in 37 % of its draws, whatever the image: no majority of many draws is."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        right = torch.where(torch.rand(len(x)) < 0.37, -1.0, 1.0)[:, None]
        return torch.cat([right, torch.zeros(len(x), 4)], 1) + self.bias + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_success_of_a_package_on_a_random_model_is_to_hold_as_one_of_ours() -> None:
    jobs = [Job(str(i), i, torch.rand(3, 4, 4), 0) for i in range(200)]
    fooled = {}
    for upholding in (0, 101):
        oracle = Oracle(OftenWrong(), eot=1, draws=21)
        oracle.upholding = upholding
        attack = parse_external("autoattack:apgd-ce:steps=1")
        results = list(ExternalEngine(oracle, attack, BALLS["Linf"], lanes=200, seed=0).run(jobs))
        fooled[upholding] = sum(result.outcome == FOOLED for result in results)
        assert sum(result.passes for result in results) == oracle.passes.forward + oracle.passes.backward
    assert fooled[0] > 2
    assert fooled[101] == 0
