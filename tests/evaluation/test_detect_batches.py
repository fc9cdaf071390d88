"""An image's scores do not depend on its batch: not on its place, nor on who stands beside it, nor on resumption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from detecting import CLASSES, DetectRun, Interrupt
from small_encoders import Blocks

from robustvlm.commands.detect.encoding import Answers
from robustvlm.defenses import load_classifier
from robustvlm.errors import UserError
from robustvlm.models.custom import CustomVLM
from robustvlm.runs.run import Run

IMAGES = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def answers(model: str, batch_size: int) -> Answers:
    classifier = load_classifier(f"small_encoders:{model}", CLASSES, ["{}"], device="cpu", cache=False)
    return Answers(classifier, batch_size=batch_size)


def rows_of(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.folder.results_path).to_pylist()


def test_the_encoder_tells_its_rows_apart() -> None:
    """Otherwise the tests below could not fail."""
    encoder = Blocks()
    whole, part = encoder.encode_image(IMAGES[:12]), encoder.encode_image(IMAGES[:11])
    assert torch.equal(whole[:6], part[:6])
    assert not torch.equal(whole[10], part[10])


@pytest.mark.parametrize("batch_size", [1, 6, 8, 12, 30])
def test_an_image_gets_the_same_bits_in_any_batch(batch_size: int) -> None:
    asked = answers("Blocks", batch_size)
    features, output = asked(IMAGES)
    assert features is not None
    assert output is None
    for start, stop in ((0, 1), (0, 11), (5, 30), (17, 19), (29, 30)):
        found, _ = asked(IMAGES[start:stop])
        assert found is not None
        assert torch.equal(found, features[start:stop])


def test_a_run_that_was_stopped_ends_with_the_same_bits(detect_run: DetectRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.commands.detect.encoding.CHUNK", 6)
    straight = detect_run("Blocks", name="straight", scores="energy,knn", batch_size=12)
    straight.start()
    with pytest.raises(KeyboardInterrupt):
        detect_run("Blocks", scores="energy,knn", batch_size=8).start(Interrupt(14))
    resumed = detect_run("Blocks", scores="energy,knn", batch_size=12)
    kept = len(list(resumed.folder.features_path.iterdir()))
    assert kept >= 2
    resumed.start()
    assert rows_of(resumed) == rows_of(straight)


def test_an_image_in_two_sets_has_one_score(detect_run: DetectRun, detect_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both" / "wolf"
    shutil.copytree(detect_images / "near" / "wolf", folder)
    shutil.copy(detect_images / "known" / "cat" / "00.png", folder / "99.png")
    run = detect_run("Blocks", scores="msp,energy", ood=[f"near=imagefolder:{folder.parent}"], batch_size=12)
    run.start()
    known, again = (row for row in rows_of(run) if row["image_id"] in ("cat/00.png", "wolf/99.png"))
    assert (known["set"], again["set"]) == ("known", "near")
    assert (known["msp"], known["energy"]) == (again["msp"], again["energy"])


def test_a_model_that_looks_at_the_whole_batch_is_refused(detect_run: DetectRun) -> None:
    with pytest.raises(UserError, match=r"depends on the other images in its batch .* pass batch_size=1") as caught:
        detect_run("Coupled", scores="msp").start()
    assert "pass --batch-size 1" in caught.value.as_typed()
    assert detect_run("Coupled", scores="msp", batch_size=1).start().summary.known.images == 18


def test_batches_of_a_random_model_are_not_filled() -> None:
    sizes: list[int] = []
    asked = answers("Random", 8)
    vlm = asked.classifier.vlm
    assert isinstance(vlm, CustomVLM)
    before = vlm.encode_image
    vlm.encode_image = lambda pixels: (sizes.append(len(pixels)), before(pixels))[1]  # type: ignore[func-returns-value,method-assign]
    asked(IMAGES[:11])
    assert sizes == [8, 8, 8, 3]


def test_memory_that_runs_out_later_costs_smaller_batches_of_the_same_bits() -> None:
    asked = answers("Blocks", 24)
    features, _ = asked(IMAGES)
    vlm = asked.classifier.vlm
    assert vlm is not None
    assert features is not None
    before, seen = vlm.encode_image, []

    def short(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 12:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        seen.append(len(pixels))
        return before(pixels)

    vlm.encode_image = short  # type: ignore[method-assign]
    found, _ = asked(IMAGES)
    assert found is not None
    assert torch.equal(found, features)
    assert seen == [12, 12, 6]


@pytest.mark.parametrize("model", ["Random", "Coin", "Gated"])
def test_a_random_model_draws_for_each_image_whatever_its_batch(detect_run: DetectRun, model: str) -> None:
    found = []
    for batch_size in (1, 5, 64):
        run = detect_run(model, name=f"by{batch_size}", scores="msp,energy", fit=None, batch_size=batch_size)
        run.start()
        found.append([(row["image_id"], row["msp"], row["energy"]) for row in rows_of(run)])
    assert found[0] == found[1] == found[2]
    assert len({energy for _, _, energy in found[0]}) > 1
