"""Result rows from facts: complete, ordered, and with nothing invented about images that were not attacked."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.commands.attack.store import SCHEMA, AttackFact, CleanFact, make_rows
from robustvlm.runs.records import write_rows

GOAL, NO_ANSWER = "misclassify", -2
EPS, ATTACKS = [0.01, 0.02], ["pgd", "apgd-t"]


def clean(index: int, *, right: bool = True) -> CleanFact:
    return CleanFact(index, f"img-{index}", 1, 1 if right else 0, 0.5 if right else -0.5, 0.9, [0, 2], exposed=right)


def found(index: int, attack: str, eps: float, outcome: str) -> AttackFact:
    fooled = outcome == "fooled"
    prediction = 0 if fooled else 1
    return AttackFact(index, attack, eps, GOAL, outcome, prediction, 3, 8, eps, eps * 2, -0.1, 0.7, 2, 0.5)


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[list[CleanFact], list[AttackFact]]:
    """Facts as a run leaves them: stages in order, none after the first success."""
    images = [clean(i, right=draw(st.booleans())) for i in range(draw(st.integers(0, 6)))]
    facts = []
    for image in images:
        for eps, attack in [(e, a) for e in EPS for a in ATTACKS] if image.exposed else ():
            outcome = draw(st.sampled_from(["fooled", "robust", "failed"]))
            facts.append(found(image.index, attack, eps, outcome))
            if outcome == "fooled":
                break
    return images, facts


@given(ledgers(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_one_row_per_image_attack_and_eps_whatever_the_order_of_the_facts(
    ledger: tuple[list[CleanFact], list[AttackFact]], shuffle: random.Random
) -> None:
    images, facts = ledger
    table = make_rows(images, facts, norm="Linf", eps=EPS, attacks=ATTACKS)
    shuffle.shuffle(images)
    shuffle.shuffle(facts)
    assert table.equals(make_rows(images, facts, norm="Linf", eps=EPS, attacks=ATTACKS))
    assert table.schema == SCHEMA
    keys = [(row["eps"], ATTACKS.index(row["attack"]), row["index"]) for row in table.to_pylist()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys) == len(images) * len(EPS) * len(ATTACKS)


@given(ledgers())
@settings(max_examples=60, deadline=None)
def test_outcomes_say_what_happened(ledger: tuple[list[CleanFact], list[AttackFact]]) -> None:
    images, facts = ledger
    known = {(fact.eps, fact.attack, fact.index): fact for fact in facts}
    right = {image.index: image.exposed for image in images}
    for row in make_rows(images, facts, norm="L2", eps=EPS, attacks=ATTACKS).to_pylist():
        fact = known.get((row["eps"], row["attack"], row["index"]))
        if fact is None:
            assert row["outcome"] == ("skipped" if right[row["index"]] else "clean_wrong")
            assert (row["adversarial_prediction"], row["restart"]) == (NO_ANSWER, -1)
            assert (row["steps"], row["passes"], row["linf"], row["l2"], row["seconds"]) == (0, 0, 0.0, 0.0, 0.0)
            assert (row["margin"], row["confidence"]) == (row["clean_margin"], row["clean_confidence"])
        else:
            assert right[row["index"]]
            assert row["outcome"] == fact.outcome
            said = NO_ANSWER if fact.outcome == "failed" else fact.prediction
            assert (row["adversarial_prediction"], row["restart"]) == (said, fact.run)
            assert (row["margin"], row["l2"], row["steps"]) == (fact.margin, fact.l2, fact.steps)
        assert row["norm"] == "L2"


def test_the_file_holds_the_table(tmp_path: Path) -> None:
    table = make_rows([clean(0), clean(1)], [found(0, "pgd", 0.01, "fooled")], norm="Linf", eps=[0.01], attacks=["pgd"])
    write_rows(tmp_path / "run" / "results.parquet", table)
    assert pq.read_table(tmp_path / "run" / "results.parquet").equals(table)
    assert pq.read_schema(tmp_path / "run" / "results.parquet").names == SCHEMA.names
