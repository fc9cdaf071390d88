"""Detect runs end to end on a small encoder: files, resumption, refusal, attacks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robustvlm.attacks import PGD, ThreatModel
from robustvlm.defenses import load_classifier
from robustvlm.detect import Head, Mahalanobis, all_metrics
from robustvlm.errors import UserError
from robustvlm.evaluation.detecting.adversarial import fool
from robustvlm.evaluation.detecting.encoding import Encoded, answers
from robustvlm.evaluation.detecting.gate import ScoreGate
from robustvlm.evaluation.detecting.observer import DetectObserver
from robustvlm.evaluation.detecting.run import PreparedDetect
from robustvlm.evaluation.detecting.scoring import make_panel
from robustvlm.evaluation.detecting.settings import Settings
from robustvlm.evaluation.detecting.setup import prepare_detect
from robustvlm.evaluation.images import Picture
from robustvlm.report.detect_html import write_detect_report
from robustvlm.runs.detect_summary import DetectSummary

CLASSES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known images in three classes (to learn from, and to judge) and two sets of others: noisy copies of patterns."""
    root = tmp_path_factory.mktemp("detect")
    draws = np.random.default_rng(5)
    patterns = {name: draws.integers(40, 216, (4, 4, 3)) for name in (*CLASSES, "wolf", "tree")}

    def write(folder: str, name: str, count: int) -> None:
        (root / folder / name).mkdir(parents=True)
        for number in range(count):
            values = np.clip(patterns[name] + draws.normal(0, 12, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(values).resize((16, 16), Image.Resampling.BICUBIC).save(
                root / folder / name / f"{number:02d}.png"
            )

    for name in CLASSES:
        write("fit", name, 8)
        write("known", name, 6)
    (root / "words.txt").write_text("\n".join(f"thing {number}" for number in range(12)))
    write("near", "wolf", 10)
    write("far", "tree", 9)
    return root


Prepare = Callable[..., PreparedDetect]


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take most of the time of so small a run; the tests that look at one make it."""
    monkeypatch.setattr("robustvlm.evaluation.detecting.run.write_detect_report", lambda folder: folder)


@pytest.fixture
def prepare(place: Path, tmp_path: Path) -> Prepare:
    """Prepare a run on these images; it is named "run" and lies in a folder of its own."""

    def make(model: str = "Encoder", *, name: str = "run", **changes: Any) -> PreparedDetect:
        settings: dict[str, Any] = {
            "model": model if ":" in model or "+" in model else f"small_encoders:{model}",
            "known": f"imagefolder:{place}/known",
            "unknown": (f"near=imagefolder:{place}/near", f"far=imagefolder:{place}/far"),
            "fit": f"imagefolder:{place}/fit",
            "words": place / "words.txt",
            "draws": 100,
            "device": "cpu",
            **changes,
        }
        return prepare_detect(Settings(**settings), out=tmp_path, name=name, command="robustvlm detect")

    return make


ATTACK: dict[str, Any] = {
    "scores": "energy,mahalanobis",
    "under_attack": True,
    "attack_scores": "energy,mahalanobis",
    "attack": "pgd:steps=5,apgd-ce:steps=5",
    "eps": "8/255",
    "attack_limit": 6,
    "lanes": 8,
}


class Interrupt(DetectObserver):
    """Presses Ctrl-C after so many images."""

    def __init__(self, images: int) -> None:
        self.left = images

    def advance(self, images: int) -> None:
        self.left -= images
        if self.left < 0:
            raise KeyboardInterrupt


def lasting(summary: DetectSummary) -> str:
    """A summary without what a clock decides, and without the last digits, which batch sizes decide."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            clock = ("seconds", "encode_ms", "microseconds")
            return {key: kept(part) for key, part in value.items() if key not in clock}
        if isinstance(value, list):
            return [kept(part) for part in value]
        return round(value, 3) if isinstance(value, float) else value

    return json.dumps(kept(summary.model_dump(mode="json")), indent=1)


def test_a_run_from_images_to_files(prepare: Prepare) -> None:
    run = prepare()
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
    # Scores that learn from images tell these clouds apart; every score but one is compared with a baseline.
    by_name = {score.name: score for score in summary.scores}
    assert by_name["mahalanobis"].on[1].auroc.value > 0.95
    assert sum(score.on[0].versus is None for score in summary.scores) == 1


def test_the_report_shows_mistakes(prepare: Prepare) -> None:
    run = prepare(scores="energy,mahalanobis", fit=None)
    run.run()
    report = write_detect_report(run.folder.path).read_text(encoding="utf-8")
    for words in ("FPR95", "Unknown (near), and accepted", "wolf/0", "pass --fit DATA", "data:image/png", "DeLong"):
        assert words in report, words
    assert "<script" not in report


def test_a_repetition_is_read_back(prepare: Prepare) -> None:
    first = prepare().run()
    again = prepare()
    again.classifier.forward = None  # type: ignore[assignment]  # any use of the model would fail
    assert again.run() == first


def test_stopped_anywhere_it_ends_the_same(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.evaluation.detecting.encoding.CHUNK", 4)
    straight = prepare(name="straight", batch_size=4, **ATTACK).run()
    for images in (5, 50, 30, 20):
        try:
            prepare(batch_size=3, **ATTACK).run(Interrupt(images))
        except KeyboardInterrupt:
            continue
    resumed = prepare(batch_size=4, **ATTACK).run()
    assert lasting(resumed) == lasting(straight)


def test_batches_and_limits(prepare: Prepare) -> None:
    """Scores do not depend on the batch size, and a smaller selection is part of a larger one."""
    whole, small = prepare(name="a", batch_size=64), prepare(name="b", batch_size=3, limit=8)
    whole.run()
    small.run()
    tables = [pq.read_table(run.folder.results_path).to_pylist() for run in (whole, small)]
    values = {(row["set"], row["image_id"]): row["energy"] for row in tables[0]}
    assert len(tables[1]) == 24
    for row in tables[1]:
        assert row["energy"] == pytest.approx(values[row["set"], row["image_id"]], abs=1e-5)


def test_nothing_to_learn_from(prepare: Prepare) -> None:
    summary = prepare(fit=None).run()
    assert summary.fit is None
    assert "--fit" in summary.skipped["knn"]
    assert {score.name for score in summary.scores} >= {"msp", "neglabel", "s-dis"}


def test_a_model_that_may_refuse_shows_its_own_decision(prepare: Prepare) -> None:
    run = prepare("small_encoders:Encoder+reject:0.9", scores="msp,energy")
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


def test_a_model_of_logits_alone(prepare: Prepare, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "only_logits.py").write_text(
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
    monkeypatch.syspath_prepend(str(place))
    summary = prepare("only_logits:Net").run()
    assert [score.name for score in summary.scores] == ["msp", "max-logit", "energy"]
    assert "encoder" in summary.skipped["mcm"]


def test_under_attack(prepare: Prepare) -> None:
    run = prepare(**ATTACK)
    summary = run.run()
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
    assert "Do scores notice adversarial images?" in write_detect_report(run.folder.path).read_text(encoding="utf-8")


def test_more_attacks_are_never_weaker(prepare: Prepare) -> None:
    changes = {**ATTACK, "attack_scores": "mahalanobis"}
    one = prepare(name="one", **{**changes, "attack": "pgd:steps=5"}).run()
    two = prepare(name="two", **changes).run()
    for before, after in zip(one.attacked, two.attacked, strict=True):
        for a, b in zip(before.on, after.on, strict=True):
            assert b.auroc_both.value <= a.auroc_both.value


def test_the_models_own_acceptance_is_attacked(prepare: Prepare) -> None:
    changes = {**ATTACK, "scores": "msp", "attack_scores": "own,msp"}
    summary = prepare("small_encoders:Encoder+reject:0.9", **changes).run()
    own, msp = summary.attacked
    assert (own.name, own.threshold) == ("own", 0.0)
    # One score up to a constant, so the same gradients: what each loses is the same.
    for a, b in zip(own.on, msp.on, strict=True):
        assert a.auroc_both.value == pytest.approx(b.auroc_both.value, abs=0.06)


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
        found = fool(classifier, pictures, attack, ThreatModel("Linf", 24 / 255), lanes=8, seed=0)
        assert found.features is not None
        logits = classifier.logit_scale * found.features @ classifier.class_embeddings.T  # type: ignore[operator,union-attr]
        assert not bool((logits.argmax(1) == found.labels).any())
        sure.append(float(logits.softmax(1).amax(1).mean()))
    assert 1 - sure[1] < 0.2 * (1 - sure[0])


def test_images_that_were_learnt_from(prepare: Prepare, place: Path) -> None:
    with pytest.raises(UserError, match="18 images are both in --fit and in --id"):
        prepare(fit=f"imagefolder:{place}/known").run()
    # The same images in another folder have other ids; they are noticed all the same.
    link = place / "copy"
    if not link.exists():
        link.symlink_to(place / "known")
    summary = prepare(name="copies", fit=f"imagefolder:{link}").run()
    assert any(check.level == "warning" and "18 of 18" in check.message for check in summary.checks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unknown": ()}, "--ood"),
        ({"known": None}, "--id"),
        ({"unknown": ("imagefolder:a", "imagefolder:a")}, "are called 'a'"),
        ({"unknown": ("known=imagefolder:a",)}, "cannot be called 'known'"),
        ({"scores": "msp,kn"}, "unknown score 'kn'"),
        ({"limit": 1}, "--limit must be at least 2"),
        ({"draws": 10}, "--draws must be at least 100"),
        ({"attack_scores": "msp"}, "--under-attack"),
        ({"under_attack": True, "attack_scores": "own"}, "never refuses"),
        ({"under_attack": True, "attack_scores": "mcm", "scores": "msp"}, "not in --scores"),
        ({"under_attack": True, "attack": "torchattacks:PGD"}, "our own attacks only"),
        ({"under_attack": True, "eps": "1/255,2/255"}, "one radius"),
        ({"unknown": ("x=nonsense:a",)}, "unknown data kind"),
        ({"fit": "emoji?split=train"}, "other classes"),
        ({"words": Path("absent.txt")}, "no words file"),
    ],
)
def test_mistakes_are_one_line(prepare: Prepare, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        prepare(**changes).run()
    assert "\n" not in str(caught.value)


def test_other_settings_are_another_run(prepare: Prepare) -> None:
    prepare(scores="msp").run()
    with pytest.raises(UserError, match="made with other settings"):
        prepare(scores="energy").run()
    assert [score.name for score in prepare(scores="energy").run(fresh=True).scores] == ["energy"]


def test_damaged_features_are_named(prepare: Prepare) -> None:
    run = prepare(scores="msp")
    run.run()
    run.folder.summary_path.unlink()
    next(run.folder.features_path.glob("known-*.safetensors")).write_bytes(b"half a file")
    with pytest.raises(UserError, match="delete it, the run makes it again"):
        prepare(scores="msp").run()


def test_unreadable_images_are_left_out_and_named(prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "broken" / "thing"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    summary = prepare(scores="msp", unknown=(f"imagefolder:{tmp_path}/broken",)).run()
    assert summary.unknown[0].images == 3
    assert [image.id for image in summary.unreadable] == ["thing/3.png"]
    (folder / "0.png").unlink()
    for path in folder.glob("[12].png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 3 images"):
        prepare(name="none", scores="msp", unknown=(f"imagefolder:{tmp_path}/broken",)).run()


def test_a_model_that_gives_nan_is_named(prepare: Prepare, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "gives_nan.py").write_text(
        "import torch\n"
        "from small_encoders import Encoder\n"
        "class Net(Encoder):\n"
        "    def encode_image(self, pixels):\n"
        "        found = super().encode_image(pixels)\n"
        "        return torch.full_like(found, torch.nan) if len(pixels) > 2 else found\n"
    )
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(UserError, match=r"NaN or infinite values, first for the image 'cat/00\.png'"):
        prepare("gives_nan:Net", scores="msp").run()


def test_small_memory(prepare: Prepare) -> None:
    whole, small = prepare(name="a", scores="energy").run(), prepare("SmallMemory", name="b", scores="energy").run()
    assert small.scores[0].on[0].auroc.value == pytest.approx(whole.scores[0].on[0].auroc.value)


def test_summaries_are_plain_json(prepare: Prepare) -> None:
    run = prepare(scores="msp,knn")
    summary = run.run()
    assert DetectSummary.model_validate(json.loads(run.folder.summary_path.read_text())) == summary
