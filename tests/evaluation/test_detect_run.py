"""Detect runs end to end on a small encoder: files, repetition, resumption, and models of all kinds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from detecting import ATTACK, CLASSES, DetectRun, Interrupt, lasting

from robustvlm.commands.detect.encoding import Encoded, answers
from robustvlm.commands.detect.scoring import make_panel
from robustvlm.commands.detect.summary import DetectSummary
from robustvlm.commands.detect.view import write_detect_report
from robustvlm.defenses import load_classifier
from robustvlm.detect.metrics import all_metrics


def test_a_run_from_images_to_files(detect_run: DetectRun) -> None:
    run = detect_run()
    summary = run.run()
    assert [(part.name, part.images) for part in summary.unknown] == [("near", 10), ("far", 9)]
    assert summary.known.images == 18
    assert summary.fit is not None
    assert summary.fit.images == 24
    rows = pq.read_table(run.folder.results_path).to_pylist()
    assert [row["set"] for row in rows] == ["known"] * 18 + ["near"] * 10 + ["far"] * 9
    assert {row["label"] for row in rows if row["set"] != "known"} == {-1}
    for score in summary.scores:
        known, near = ([row[score.name] for row in rows if row["set"] == part] for part in ("known", "near"))
        assert score.on[0].auroc.value == pytest.approx(all_metrics(known, near).auroc[0])
        assert score.on[0].fpr95.low <= score.on[0].fpr95.value <= score.on[0].fpr95.high
        accepted = np.mean([value > score.threshold for value in known])
        assert 0.94 <= accepted <= 1.0
    # Scores that learn from images tell these clouds apart; every score is compared with a baseline other than itself.
    by_name = {score.name: score for score in summary.scores}
    assert by_name["mahalanobis"].on[1].auroc.value > 0.95
    assert not any(score.on[0].versus is None or score.on[0].versus.baseline == score.name for score in summary.scores)


def test_the_report_shows_mistakes(detect_run: DetectRun) -> None:
    run = detect_run(scores="energy,mahalanobis", fit=None)
    run.run()
    report = write_detect_report(run.folder.path).read_text(encoding="utf-8")
    for words in ("FPR95", "Unknown (near), and accepted", "wolf/0", "pass --fit DATA", "data:image/png", "DeLong"):
        assert words in report, words
    assert "<script" not in report


def test_a_repetition_is_read_back(detect_run: DetectRun) -> None:
    first = detect_run().run()
    again = detect_run()
    again.classifier.forward = None  # type: ignore[assignment]  # any use of the model would fail
    assert again.run() == first


def test_stopped_anywhere_it_ends_the_same(detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.commands.detect.encoding.CHUNK", 4)
    straight = detect_run(name="straight", batch_size=4, **ATTACK).run()
    for images in (5, 50, 30, 20):
        try:
            detect_run(batch_size=3, **ATTACK).run(Interrupt(images))
        except KeyboardInterrupt:
            continue
    resumed = detect_run(batch_size=4, **ATTACK).run()
    assert lasting(resumed) == lasting(straight)


def test_batches_and_limits(detect_run: DetectRun) -> None:
    """Scores do not depend on the batch size, and a smaller selection is part of a larger one."""
    whole, small = detect_run(name="a", batch_size=64), detect_run(name="b", batch_size=3, limit=8)
    whole.run()
    small.run()
    tables = [pq.read_table(run.folder.results_path).to_pylist() for run in (whole, small)]
    values = {(row["set"], row["image_id"]): row["energy"] for row in tables[0]}
    assert len(tables[1]) == 24
    for row in tables[1]:
        assert row["energy"] == pytest.approx(values[row["set"], row["image_id"]], abs=1e-5)


def test_nothing_to_learn_from(detect_run: DetectRun) -> None:
    summary = detect_run(fit=None).run()
    assert summary.fit is None
    assert "--fit" in summary.skipped["knn"]
    assert {score.name for score in summary.scores} >= {"msp", "neglabel", "s-dis"}


def test_a_model_that_may_refuse_shows_its_own_decision(detect_run: DetectRun) -> None:
    run = detect_run("small_encoders:Encoder+reject:0.9", scores="msp,energy")
    summary = run.run()
    assert [score.name for score in summary.scores] == ["own", "msp", "energy"]
    assert summary.own is not None
    rows = pq.read_table(run.folder.results_path).to_pylist()
    known = [row["own"] for row in rows if row["set"] == "known"]
    assert summary.own.accepted_known.successes == sum(value > 0 for value in known)
    # Its acceptance is the log-odds of MSP less a constant.
    own, msp = summary.scores[0], summary.scores[1]
    assert own.threshold == 0.0
    assert own.on[0].auroc.value == pytest.approx(msp.on[0].auroc.value)


def test_a_model_of_logits_alone(detect_run: DetectRun, detect_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (detect_images / "only_logits.py").write_text(
        "import torch\n"
        "from small_encoders import Encoder\n"
        "class Net(torch.nn.Module):\n"
        "    image_size = 16\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = Encoder()\n"
        "    def forward(self, x):\n"
        "        return self.inner.encode_image(x)[:, :3]\n"
    )
    monkeypatch.syspath_prepend(str(detect_images))
    summary = detect_run("only_logits:Net").run()
    assert [score.name for score in summary.scores] == ["msp", "max-logit", "energy"]
    assert "encoder" in summary.skipped["mcm"]


def test_an_immunised_model_shows_its_score_before_thresholds() -> None:
    from robustvlm.defenses.immunity import immunise_without_images
    from robustvlm.defenses.immunity.classifier import ImmunisedClassifier

    vlm = load_classifier("small_encoders:Encoder", CLASSES, ["{}"], cache=False).vlm
    assert vlm is not None
    immunity = immunise_without_images(vlm, CLASSES, ["{}"], ["wolf", "oak"])
    classifier = ImmunisedClassifier(vlm, immunity)
    panel = make_panel(classifier, ["{}"], ["msp"], None, None)
    pixels = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, output = answers(classifier, pixels)
    assert features is not None
    assert output is not None
    found = panel.scores(Encoded([str(i) for i in range(9)], torch.zeros(9, dtype=torch.int64), features, output))
    assert list(found) == ["own", "own-s-dis", "msp"]
    thresholds = classifier.thresholds[output[:, :-1].argmax(1)]
    assert torch.allclose(found["own-s-dis"] - thresholds, found["own"], atol=1e-5)


def test_small_memory(detect_run: DetectRun) -> None:
    whole, small = (
        detect_run(name="a", scores="energy").run(),
        detect_run("SmallMemory", name="b", scores="energy").run(),
    )
    assert small.scores[0].on[0].auroc.value == pytest.approx(whole.scores[0].on[0].auroc.value)


def test_summaries_are_plain_json(detect_run: DetectRun) -> None:
    run = detect_run(scores="msp,knn")
    summary = run.run()
    assert DetectSummary.model_validate(json.loads(run.folder.summary_path.read_text())) == summary
