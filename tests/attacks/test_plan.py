"""Plans: what the names stand for, options and budgets of their members, any number of classes."""

from __future__ import annotations

import pytest
import torch
from toy import Linear, attack_all, fooled, right_jobs

from robustvlm.attacks import ATTACKS, Job, LaneEngine, Oracle, Square, ThreatModel, parse_attacks
from robustvlm.attacks.catalog import PLANS, recommended_eot
from robustvlm.errors import UserError


def names(text: str, **settings: int) -> list[str]:
    return [attack.name for attack in parse_attacks(text, **settings)]


def test_standard_is_autoattack():
    attacks = {attack.name: attack for attack in parse_attacks("standard")}
    assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert {name: attack.n_iter for name, attack in attacks.items()} == {
        "apgd-ce": 100, "apgd-t": 100, "fab-t": 100, "square": 5000,
    }  # fmt: skip
    assert [attacks[name].n_runs(10) for name in attacks] == [1, 9, 9, 1]
    assert [attacks[name].n_runs(3) for name in attacks] == [1, 2, 2, 1]


def test_plus_has_five_restarts_where_published():
    runs = {attack.name.split(":")[0]: attack.n_runs(10) for attack in parse_attacks("plus")}
    assert runs == {"apgd-ce": 5, "apgd-dlr": 5, "apgd-t": 9, "fab-t": 9, "square": 1, "fab": 5}


def test_rand_and_fare():
    assert names("rand") == ["apgd-ce", "apgd-dlr"]
    assert names("fare") == ["apgd-ce", "apgd-t"]
    assert {text: recommended_eot(text) for text in ("rand", "pgd,rand", "fare", "pgd")} == {
        "rand": 20, "pgd,rand": 20, "fare": 1, "pgd": 1,
    }  # fmt: skip


def test_options_of_a_plan_go_to_the_members_that_have_them():
    assert names("standard:steps=50") == ["apgd-ce:steps=50", "apgd-t:steps=50", "fab-t:steps=50", "square"]
    assert names("standard:queries=200:targets=3") == [
        "apgd-ce", "apgd-t:targets=3", "fab-t:targets=3", "square:queries=200",
    ]  # fmt: skip
    assert names("plus:restarts=2")[0] == "apgd-ce:restarts=2"
    assert names("fare,square") == ["apgd-ce", "apgd-t", "square"]


def test_steps_do_not_shorten_a_search_that_counts_queries():
    attacks = parse_attacks("apgd-ce,square", steps=20)
    assert [attack.n_iter for attack in attacks] == [20, 5000]
    assert parse_attacks("square:queries=300")[0].n_iter == 300
    assert [attack.n_restarts for attack in parse_attacks("plus", restarts=2)] == [5, 5, 2, 2, 2, 5]


def test_futility_can_be_switched_off():
    on, off = (parse_attacks(text)[0] for text in ("square", "square:futility=off"))
    assert isinstance(on, Square)
    assert isinstance(off, Square)
    assert (on.futility, off.futility) == (True, False)


@pytest.mark.parametrize(
    "text",
    ["standart", "fare:queries=10", "standard:colour=red", "standard,apgd-ce", "square:steps=10", "pgd:queries=10",
     "square:futility=maybe", "square:queries=0", "square:p_init=0", "square:p_init=2", "square:objective=ce-t",
     "standard:steps=x", "standard:steps"],
)  # fmt: skip
def test_bad_texts_are_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        parse_attacks(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [2, 3, 4, 21_000])
def test_every_attack_works_with_any_number_of_classes(classes):
    """Two and three classes: DLR falls back as objectives.py states; targets are the classes that there are."""
    model = Linear(classes=classes)
    count = 4
    jobs = right_jobs(model, count)
    assert {len(job.targets) for job in jobs} == {min(9, classes - 1)}
    for name in ATTACKS:
        (attack,) = parse_attacks(f"{name}:queries=60" if name == "square" else name, steps=4)
        results = attack_all(model, attack, ThreatModel("Linf", 0.3), jobs, lanes=count)
        assert fooled(results) == set(range(count)), name
        assert all(torch.isfinite(result.adversarial).all() for result in results)


@pytest.mark.parametrize(
    ("text", "common", "said"),
    [
        ("pgd:steps=1:steps=2", {}, "sets steps twice"),
        ("standard:targets=3:targets=4", {}, "sets targets twice"),
        ("torchattacks:PGD:steps=3:steps=4", {}, "sets steps twice"),
        ("fgsm", {"steps": -1}, "--steps must be between 1 and 100,000"),
        ("fgsm", {"restarts": 0}, "--restarts must be between 1 and 100,000"),
        ("torchattacks:FGSM", {"steps": 10**9}, "--steps must be between"),
        ("apgd-t:targets=99999:steps=1000", {}, "at most 1,000,000"),
        ("pgd:steps=100000:restarts=100000", {}, "at most 1,000,000"),
        ("torchattacks:SPSA:nb_sample=1000000000000", {}, "from 0 to 100,000"),
        ("torchattacks:PGD:alpha=nan", {}, "expected a number"),
        ("pgd:step_size=nan", {}, "step_size must be positive"),
        ("pgd:step_size=1e-300", {}, "the least to move a bright pixel"),
        ("pgd:step_size=1e300", {}, "step_size must be between"),
    ],
)
def test_numbers_without_sense_or_end_are_refused(text, common, said):
    with pytest.raises(UserError, match=said):
        parse_attacks(text, **common)


def test_a_job_without_targets_is_refused_by_an_attack_that_needs_one():
    (attack,) = parse_attacks("apgd-t", steps=2)
    engine = LaneEngine(Oracle(Linear(classes=4)), attack, ThreatModel("Linf", 0.1), lanes=2, seed=0)
    with pytest.raises(UserError, match="image 'a' names no class to aim at"):
        list(engine.run([Job("a", 0, torch.rand(3, 8, 8), label=0)]))


def test_plans_name_attacks_that_exist():
    for plan in PLANS:
        assert names(plan)
