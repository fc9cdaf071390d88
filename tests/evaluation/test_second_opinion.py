"""The check that names what only the second opinion broke."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from robustvlm.commands.attack.checks import of_second_opinion
from robustvlm.commands.attack.store import AttackFact, CleanFact


def clean(count: int, wrong: int = 0) -> list[CleanFact]:
    return [CleanFact(i, f"image-{i}", 0, int(i < wrong), 1.0, 0.9, [1], exposed=i >= wrong) for i in range(count)]


def fact(index: int, attack: str, outcome: str, eps: float = 0.1) -> AttackFact:
    return AttackFact(index, attack, eps, "misclassify", outcome, 0, 1, 2, eps, eps, 0.1, 0.9, 0, 0.1)


def test_agreement_is_ok() -> None:
    found = [fact(0, "pgd", "fooled"), fact(1, "pgd", "robust"), fact(1, "autoattack", "robust")]
    (check,) = of_second_opinion(clean(2), found, attack="autoattack")
    assert (check.name, check.level) == ("second opinion", "ok")
    assert check.message == "'autoattack' attacked the 1 image again that withstood our own attacks, and broke none."


def test_nothing_left_is_ok() -> None:
    (check,) = of_second_opinion(clean(1), [fact(0, "pgd", "fooled")], attack="autoattack")
    assert check.level == "ok"
    assert "No image was left" in check.message


def test_disagreement_names_every_image_with_a_paired_test() -> None:
    found = [fact(0, "pgd", "fooled"), *(fact(i, "pgd", "robust") for i in range(1, 9))]
    found += [fact(i, "autoattack", "fooled" if i < 7 else "robust") for i in range(1, 9)]
    (check,) = of_second_opinion(clean(9), found, attack="autoattack")
    assert check.level == "fault"
    assert "broke 6 of the 8 images" in check.message
    assert all(f"'image-{i}'" in check.message for i in range(1, 7))
    assert "'image-7'" not in check.message
    # Six discordant images, all on one side: twice 1/64.
    assert "9 images: p = 0.031." in check.message


def test_on_a_random_model_a_disagreement_may_be_luck() -> None:
    found = [fact(0, "pgd", "robust"), fact(0, "autoattack", "fooled")]
    (check,) = of_second_opinion(clean(1), found, attack="autoattack", random=True)
    assert check.level == "note"
    assert "luck decides" in check.message
    assert "bug" not in check.message


def test_a_run_that_ended_early_is_told() -> None:
    found = [fact(0, "pgd", "robust"), fact(1, "pgd", "robust"), fact(0, "autoattack", "robust")]
    (check,) = of_second_opinion(clean(2), found, attack="autoattack")
    assert check.level == "note"
    assert "1 are left" in check.message


def test_failed_answers_and_wrong_images_do_not_count() -> None:
    found = [fact(1, "pgd", "robust"), fact(1, "autoattack", "failed")]
    (check,) = of_second_opinion(clean(2, wrong=1), found, attack="autoattack")
    assert check.level == "ok"


def test_every_eps_has_its_own_check() -> None:
    found = [
        fact(0, "pgd", "robust", 0.1), fact(0, "aa", "robust", 0.1),
        fact(0, "pgd", "robust", 0.2), fact(0, "aa", "fooled", 0.2),
    ]  # fmt: skip
    checks = of_second_opinion(clean(1), found, attack="aa")
    named = {check.name: check.level for check in checks}
    assert named == {"second opinion at eps 0.1": "ok", "second opinion at eps 0.2": "fault"}


@given(st.lists(st.sampled_from(["ours", "theirs", "none"]), min_size=1, max_size=30))
def test_the_numbers_are_those_of_the_rows(kinds: list[str]) -> None:
    found = [fact(i, "pgd", "fooled" if kind == "ours" else "robust") for i, kind in enumerate(kinds)]
    found += [
        fact(i, "aa", "fooled" if kind == "theirs" else "robust") for i, kind in enumerate(kinds) if kind != "ours"
    ]
    (check,) = of_second_opinion(clean(len(kinds)), found, attack="aa")
    only = kinds.count("theirs")
    assert (check.level == "fault") == (only > 0)
    if only:
        assert f"broke {only} of the {len(kinds) - kinds.count('ours')} image" in check.message
        assert f"{len(kinds)} images: p = {min(1.0, 2 * 0.5**only):.2g}." in check.message
