"""What would make a detect run's numbers mean something else than they say: each is left out, refused or named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from detecting import DetectRun

from robustvlm.commands.detect import words
from robustvlm.commands.detect.encoding import embed_words
from robustvlm.commands.detect.summary import DetectSummary
from robustvlm.commands.detect.view import read_run, write_report
from robustvlm.detect import Detector
from robustvlm.detect.catalog import SCORES, Score, Supplies
from robustvlm.errors import UserError
from robustvlm.models.custom import CustomVLM


def messages(summary: DetectSummary, level: str) -> str:
    return " | ".join(check.message for check in summary.checks if check.level == level)


def with_words(folder: Path, *more: str) -> Path:
    path = folder / "words.txt"
    path.write_text("\n".join([*(f"thing {number}" for number in range(12)), *more]), encoding="utf-8")
    return path


def test_words_that_name_a_class_of_an_unknown_set_are_left_out_and_counted(
    detect_run: DetectRun, tmp_path: Path
) -> None:
    """The sets hold wolves and trees: plural, case and article do not hide a name."""
    clean = detect_run(name="clean", scores="neglabel,s-dis", words=with_words(tmp_path)).start().summary
    named = with_words(tmp_path, "Wolves", "a tree", "wolfhound")
    run = detect_run(name="named", scores="neglabel,s-dis", words=named)
    assert run.work.words == (*(f"thing {number}" for number in range(12)), "wolfhound")
    summary = run.start().summary
    assert summary.words is not None
    assert summary.words.naming == {"Wolves": "near", "a tree": "far"}
    assert summary.words.used == 13
    assert "2 words that name classes of the unknown sets were left out" in messages(summary, "note")
    assert words.oracle_titles(summary) == []
    # With them kept it is an oracle, and says so.
    oracle_run = detect_run(name="oracle", scores="neglabel,s-dis", words=named, oracle_words=True)
    oracle = oracle_run.start().summary
    assert oracle.words is not None
    assert oracle.words.used == 15
    assert "Oracle: 2 words" in messages(oracle, "warning")
    assert words.oracle_titles(oracle) == ["NegLabel", "S_DIS, text only"]
    assert words.tone(oracle) != "held"
    page = write_report(oracle_run.folder.path).read_text(encoding="utf-8")
    assert "Oracle: NegLabel, S_DIS, text only use 2 words" in page
    assert '<span class="small">oracle</span>' in page
    assert clean.words is not None
    assert clean.words.naming == {}
    assert "words that name" not in messages(clean, "note")


@pytest.mark.parametrize("code", ["7", "class_7", "n99999999"])
def test_names_that_cannot_be_known_are_said_to_be_unknown(
    detect_run: DetectRun, detect_images: Path, code: str
) -> None:
    root = detect_images / f"numbered-{code}"
    if not root.exists():
        shutil.copytree(detect_images / "near" / "wolf", root / code)
    summary = detect_run(scores="msp", ood=[f"near=imagefolder:{root}"]).start().summary
    assert "'near' has no names for its classes" in messages(summary, "note")


def test_known_classes_in_an_unknown_set_are_left_out_and_named(detect_run: DetectRun, detect_images: Path) -> None:
    root = detect_images / "mixed"
    if not root.exists():
        shutil.copytree(detect_images / "near" / "wolf", root / "wolf")
        shutil.copytree(detect_images / "fit" / "cat", root / "Cats")
    alone = detect_run(name="alone", scores="energy").start().summary
    run = detect_run(name="mixed", scores="energy", ood=[f"near=imagefolder:{root}"])
    summary = run.start().summary
    assert summary.unknown[0].images == 10
    assert summary.scores[0].on[0].auroc.value == pytest.approx(alone.scores[0].on[0].auroc.value)
    assert "8 images of the set 'near' are of known classes and were left out: cat (8)." in messages(summary, "warning")
    rows = pq.read_table(run.folder.results_path).to_pylist()
    assert not [row for row in rows if row["set"] == "near" and row["image_id"].startswith("Cats/")]
    with pytest.raises(UserError, match=r"is of a known class \(cat, dog, fox\): pass others to ood"):
        detect_run(name="all", ood=[f"near=imagefolder:{detect_images}/fit"]).start()


def test_one_image_in_both_sets_is_noticed(detect_run: DetectRun, detect_images: Path) -> None:
    root = detect_images / "copied"
    if not root.exists():
        shutil.copytree(detect_images / "near" / "wolf", root / "wolf")
        shutil.copy(detect_images / "known" / "cat" / "00.png", root / "wolf" / "99.png")
    summary = detect_run(scores="energy", ood=[f"near=imagefolder:{root}"]).start().summary
    assert "1 of 11 images of the set 'near' look to the model like images of --id" in messages(summary, "warning")


class Flat(Detector):
    """Gives every image the same score."""

    def score(self, features: torch.Tensor) -> torch.Tensor:
        return features.new_full((len(features),), 3.0)


class Broken(Detector):
    """Has no score for some images."""

    def score(self, features: torch.Tensor) -> torch.Tensor:
        return torch.where(features[:, 0] > features[:, 0].median(), torch.nan, features[:, 0])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Detector], None]:
    """Put a score of one's own into the place of one of the catalogue."""

    def plant(name: str, detector: Detector) -> None:
        def make(_: Supplies) -> Detector:
            return detector

        monkeypatch.setitem(SCORES, name, Score(name, SCORES[name].title, "", (), make))

    return plant


def test_a_score_that_is_the_same_everywhere_is_named(
    detect_run: DetectRun, planted: Callable[[str, Detector], None]
) -> None:
    planted("max-logit", Flat())
    summary = detect_run(scores="msp,max-logit").start().summary
    flat = next(score for score in summary.scores if score.name == "max-logit")
    assert [on.auroc.value for on in flat.on] == [0.5, 0.5]
    assert flat.on[0].auroc.high - flat.on[0].auroc.low > 0.5
    assert "The same for every image, so that they tell nothing: MaxLogit." in messages(summary, "warning")


def test_a_score_that_is_not_a_number_is_skipped_by_name(
    detect_run: DetectRun, planted: Callable[[str, Detector], None]
) -> None:
    planted("max-logit", Broken())
    summary = detect_run(scores="msp,max-logit").start().summary
    assert [score.name for score in summary.scores] == ["msp"]
    assert "is NaN or infinite for" in summary.skipped["max-logit"]
    with pytest.raises(UserError, match="no score is finite for every image; the first, 'max-logit'"):
        detect_run(name="alone", scores="max-logit").start()


def test_own_scores_can_be_asked_for_by_name(detect_run: DetectRun) -> None:
    summary = detect_run("small_encoders:Encoder+reject:0.9", scores="own").start().summary
    assert [score.name for score in summary.scores] == ["own"]
    assert all(on.versus is None for on in summary.scores[0].on)
    assert words.comparison(summary) == "There is no other baseline to compare it with."
    both = detect_run("small_encoders:Encoder+reject:0.9", name="both", scores="own,msp").start().summary
    assert [score.name for score in both.scores] == ["own", "msp"]
    with pytest.raises(UserError, match="never refuses, so it has no score of its own"):
        detect_run(name="bare", scores="own")


def test_every_score_is_compared_with_another_and_the_headline_names_its_criterion(detect_run: DetectRun) -> None:
    run = detect_run(scores="msp,mcm,max-logit,energy")
    summary = run.start().summary
    for score in summary.scores:
        for place, on in enumerate(score.on):
            others = {other.name: other.on[place].auroc.value for other in summary.scores if other.name != score.name}
            assert on.versus is not None
            assert on.versus.baseline != score.name
            assert others[on.versus.baseline] == max(others.values())
            assert on.versus.difference == pytest.approx(on.auroc.value - max(others.values()))
    means = {score.title: sum(on.auroc.value for on in score.on) / 2 for score in summary.scores}
    best = max(means, key=lambda title: means[title])
    said = words.verdict(summary)
    assert said.startswith(f"{best} has the highest mean AUROC over the 2 sets, {means[best]:.3f}:")
    for place, unknown in enumerate(("near", "far")):
        top = max(summary.scores, key=lambda score: score.on[place].auroc.value)
        shown = next(score for score in summary.scores if score.title == best)
        higher = top.on[place].auroc.value > shown.on[place].auroc.value
        assert (f"{top.title} on {unknown}" in said) == higher
    assert "It is a usual baseline itself; it " in words.comparison(summary)
    assert f"best other baseline ({best}" not in words.comparison(summary)
    one = detect_run(name="one", scores="msp", ood=[summary.unknown[0].spec]).start().summary
    assert words.verdict(one).startswith("MSP has the highest AUROC: ")


def test_the_colour_of_the_verdict_says_what_it_means(detect_run: DetectRun) -> None:
    run = detect_run(scores="msp,energy")
    run.start()
    summary = read_run(run.folder.path).summary
    quiet = summary.model_copy(update={"checks": []})

    def judged(low: float, fpr: float, high: float) -> str:
        scores = []
        for score in quiet.scores:
            on = [
                at.model_copy(
                    update={
                        "auroc": at.auroc.model_copy(update={"low": low}),
                        "fpr95": at.fpr95.model_copy(update={"value": fpr, "high": high}),
                    }
                )
                for at in score.on
            ]
            scores.append(score.model_copy(update={"on": on}))
        return words.tone(quiet.model_copy(update={"scores": scores}))

    assert judged(0.95, 0.02, 0.05) == "held"
    assert judged(0.95, 0.05, 0.2) == "neutral"
    assert judged(0.9, 0.6, 0.7) == ""
    assert judged(0.49, 0.05, 0.09) == ""


def test_kept_word_embeddings_are_those_of_the_same_words(tmp_path: Path) -> None:
    from small_encoders import Encoder

    vlm, path = CustomVLM(Encoder(), spec="small_encoders:Encoder"), tmp_path / "words.safetensors"
    first = embed_words(vlm, ["one", "two"], ["{}"], path, owner={})
    other = embed_words(vlm, ["one", "six"], ["{}"], path, owner={})
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(embed_words(vlm, ["one", "six"], ["{}"], path, owner={}), other)
