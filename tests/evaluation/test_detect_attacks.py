"""Detect runs under attack: scores that are attacked, the gates they make, and adversarial images."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from detecting import ATTACK, CLASSES, DetectRun

from robustvlm import attacks
from robustvlm.attacks import PGD, ThreatModel
from robustvlm.attacks.probe import EOT_IF_RANDOM
from robustvlm.commands.common.inputs import Picture
from robustvlm.commands.detect import adversarial, measures
from robustvlm.commands.detect.adversarial import fool
from robustvlm.commands.detect.attack import ScoreGate
from robustvlm.commands.detect.encoding import Answers
from robustvlm.commands.detect.measures import Scored
from robustvlm.commands.detect.summary import Adversarial
from robustvlm.commands.detect.view import write_report
from robustvlm.defenses import load_classifier
from robustvlm.detect import Head, Mahalanobis


def test_under_attack(detect_run: DetectRun) -> None:
    run = detect_run(**ATTACK)
    summary = run.start().summary
    assert [score.name for score in summary.attacked] == ["energy", "mahalanobis"]
    for score in summary.attacked:
        assert score.accepted_attacked.successes <= score.accepted_clean.successes
        for on in score.on:
            assert on.accepted_attacked.successes >= on.accepted_clean.successes
            assert on.auroc_both.value <= min(on.auroc_intrude.value, on.auroc_deny.value)
            assert max(on.auroc_intrude.value, on.auroc_deny.value) <= on.auroc_clean.value
    learnt = summary.attacked[1].on[0]
    assert learnt.auroc_clean.value > 0.9
    assert learnt.auroc_both.value < 0.5
    rows = pq.read_table(run.folder.attacked_path).to_pylist()
    assert len(rows) == 2 * 2 * (6 + 6 + 6)
    assert {row["goal"] for row in rows if row["set"] == "known"} == {"deny"}
    assert max(row["linf"] for row in rows) <= 8 / 255 + 1e-9
    clean = {(r["set"], r["image_id"]): r for r in pq.read_table(run.folder.results_path).to_pylist()}
    for row in rows:
        before = clean[row["set"], row["image_id"]][row["score"]]
        assert row["clean"] == before
        assert row["attacked"] <= before if row["goal"] == "deny" else row["attacked"] >= before
    assert summary.adversarial is not None
    assert summary.adversarial.fooled > 0
    assert "Do scores notice adversarial images?" in write_report(run.folder.path).read_text(encoding="utf-8")


def test_more_attacks_are_never_weaker(detect_run: DetectRun) -> None:
    changes = {**ATTACK, "attack_scores": "mahalanobis"}
    one = detect_run(name="one", **{**changes, "attack": "pgd:steps=5"}).start().summary
    two = detect_run(name="two", **changes).start().summary
    for before, after in zip(one.attacked, two.attacked, strict=True):
        for a, b in zip(before.on, after.on, strict=True):
            assert b.auroc_both.value <= a.auroc_both.value


def test_the_models_own_acceptance_is_attacked(detect_run: DetectRun) -> None:
    changes = {**ATTACK, "scores": "msp", "attack_scores": "own,msp"}
    summary = detect_run("small_encoders:Encoder+reject:0.9", **changes).start().summary
    own, msp = summary.attacked
    assert (own.name, own.threshold) == ("own", 0.0)
    # One score up to a constant, so the same gradients: what each loses is the same.
    for a, b in zip(own.on, msp.on, strict=True):
        assert a.auroc_both.value == pytest.approx(b.auroc_both.value, abs=0.06)


def test_gates_answer_as_scores() -> None:
    inner = load_classifier("small_encoders:Encoder", CLASSES, ["{}"], cache=False)
    pixels = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert inner.vlm is not None
    features = inner.vlm.encode_image(pixels)
    detector = Mahalanobis().fit_features(features, torch.arange(12) % 3)
    head = Head(inner.class_embeddings, inner.vlm.logit_scale)  # type: ignore[arg-type]
    gate = ScoreGate(inner, head, detector, threshold=-3.0)
    output = gate(pixels)
    assert torch.allclose(output[:, :-1], inner(pixels), atol=1e-5)
    assert torch.allclose(output[:, -1], detector.score(features) + 3.0, atol=1e-4)
    assert gate.fingerprint != ScoreGate(inner, head, detector, threshold=-4.0).fingerprint


def test_adversarial_images_do_not_stop_at_the_border() -> None:
    """With more steps they are the surer of their wrong class: no image leaves at its first success."""
    classifier = load_classifier("small_encoders:Encoder", CLASSES, ["{}"], cache=False)
    pixels = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = classifier(pixels).argmax(1).tolist()
    pictures = [Picture(str(i), label, image) for i, (label, image) in enumerate(zip(labels, pixels, strict=True))]
    sure = []
    for steps in (2, 12):
        attack = PGD(n_iter=steps, step_size=2 / 255)
        found = fool(
            Answers(classifier, batch_size=16), pictures, attack, ThreatModel("Linf", 24 / 255), lanes=8, seed=0
        )
        assert found.features is not None
        logits = classifier.logit_scale * found.features @ classifier.class_embeddings.T  # type: ignore[operator,union-attr]
        assert not bool((logits.argmax(1) == found.labels).any())
        sure.append(float(logits.softmax(1).amax(1).mean()))
    assert 1 - sure[1] < 0.2 * (1 - sure[0])


def test_adversarial_images_are_told_from_right_ones_alone(
    detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Scored, list[int], Scored]] = []
    summarise = measures.summarise_adversarial

    def noted(known: Scored, clean: list[int], fooled: Scored, *, attacked: int) -> Adversarial:
        seen.append((known, clean, fooled))
        return summarise(known, clean, fooled, attacked=attacked)

    monkeypatch.setattr(measures, "summarise_adversarial", noted)
    found = detect_run(**ATTACK | {"attack_limit": 100, "attack_scores": "energy"}).start().summary
    ((known, clean, fooled),) = seen
    assert found.accuracy.successes < found.accuracy.total
    assert all(known.labels[row] == known.predictions[row] for row in clean)
    assert not {known.ids[row] for row in clean} & set(fooled.ids)
    assert found.adversarial is not None
    assert found.adversarial.attacked == found.accuracy.successes // 2
    assert found.adversarial.unattacked == len(clean) == found.accuracy.successes - found.adversarial.attacked


def test_where_no_right_image_is_left_to_compare_with_a_check_says_so(
    detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial, "half_of", lambda _: frozenset())
    found = detect_run(**ATTACK | {"attack_scores": "energy", "attack": "pgd:steps=1"}).start().summary
    assert found.adversarial is None
    assert any("too few known images right" in check.message for check in found.checks)


def test_gradients_of_a_random_model_are_averaged_where_it_is_fooled(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    classifier = load_classifier("small_encoders:Random", CLASSES, ["{}"], cache=False)
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures = [Picture(str(i), i % 3, image) for i, image in enumerate(pixels)]
    jobs = attacks.LaneEngine.run
    monkeypatch.setattr(attacks.LaneEngine, "run", lambda self, todo: draws.append(self.oracle.eot) or jobs(self, todo))
    fool(Answers(classifier, batch_size=4), pictures, PGD(n_iter=1), ThreatModel("Linf", 8 / 255), lanes=4, seed=0)
    assert draws == [EOT_IF_RANDOM]
