"""Fixed texts under a frozen text tower are encoded once, whoever asks: every reader of texts, twice."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustvlm.attacks import ThreatModel
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.materials import materials_of
from robustvlm.commands.detect.encoding import embed_words
from robustvlm.commands.immunize.images import embedder
from robustvlm.data.trees import Forest, Tree
from robustvlm.defenses.finetune import FinetuneSettings, finetune_task
from robustvlm.defenses.finetune.hierarchical import Hierarchical, ProjectedTexts
from robustvlm.defenses.immunity.recipe import immunise_without_images
from robustvlm.defenses.immunity.state import AdaptedVLM, Adapter
from robustvlm.defenses.pipeline import apply_operations
from robustvlm.defenses.purify.parts import PurifiedVLM
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.defenses.specs import Operation
from robustvlm.models import VLM, load_model, zero_shot
from robustvlm.models.class_cache import cache_file, forget_embeddings
from robustvlm.models.export import write_clip_folder
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import LabelledImages, RobustValidation
from robustvlm.training.validation import ZeroShotValidation

from .conftest import VIT

NAMES = ("apple", "dog", "small cat", "tram", "lamp")
OTHERS = ("peach", "wolf", "lion")
TEMPLATES = ("a photo of a {}", "{}", "the {}")
FOREST = Forest(
    (Tree((("food", "apple"), ("animal", "dog"), ("animal", "small cat"), ("kind", "tram"), ("kind", "lamp"))),)
)


@pytest.fixture
def folder(save_clip: Callable[..., Path]) -> Path:
    return save_clip(model_cfg=VIT | {"quick_gelu": True})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows through text towers, batch by batch."""
    rows: list[int] = []
    plain = VLM.embed_text

    def embed_text(self: VLM, texts: list[str]) -> Tensor:
        rows.append(len(texts))
        return plain(self, texts)

    monkeypatch.setattr(VLM, "embed_text", embed_text)
    return rows


def of_finetune(vlm: VLM, method: str = "tecoa") -> Tensor:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    task = finetune_task(
        vlm,
        FinetuneSettings(method=method),
        class_names=NAMES,
        templates=TEMPLATES,
        calibration=pixels,
        forest=FOREST if method == "hierarchical" else None,
        in_place=True,
    )
    return task.method.texts() if isinstance(task.method, Hierarchical) else task.method.class_embeddings


def of_validation(vlm: VLM) -> Tensor:
    validation = validation_of(vlm)
    validation()
    assert validation._embeddings is not None
    return validation._embeddings


def validation_of(vlm: VLM, *, in_training: bool = False) -> ZeroShotValidation:
    images = LabelledImages(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    robust = RobustValidation(images, ThreatModel("Linf", 1 / 255), n_iter=1)
    return ZeroShotValidation(vlm, NAMES, TEMPLATES, robust, texts_change=in_training, in_training=in_training)


def of_words(vlm: VLM, number: list[int] = [0]) -> Tensor:  # noqa: B006 a file of its own each time, as of another run
    number[0] += 1
    return embed_words(vlm, NAMES, TEMPLATES, cache_file("x").parent / f"words-{number[0]}.safetensors", owner={})


def of_certify(vlm: VLM) -> Tensor:
    listed = cache_file("x").parent.parent / "antibodies.txt"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("\n".join(NAMES))
    config = CertifyConfig.model_construct(claim="openset", antibodies=str(listed))
    found = materials_of(config, vlm, None, TEMPLATES).against
    assert found is not None
    return torch.from_numpy(found)


READERS: dict[str, Callable[[VLM], Tensor]] = {
    "a classifier": lambda vlm: zero_shot(vlm, NAMES, TEMPLATES).class_embeddings,
    "finetune": of_finetune,
    "finetune, trees": lambda vlm: of_finetune(vlm, "hierarchical"),
    "validation": of_validation,
    "immunize": lambda vlm: embedder(vlm, TEMPLATES)(NAMES),
    "antibodies": lambda vlm: immunise_without_images(vlm, NAMES, TEMPLATES, OTHERS).antibodies.embeddings,
    "detect": of_words,
    "certify": of_certify,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_second_run_encodes_the_first_class_alone(
    reader: str, folder: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = READERS[reader]
    first = ask(load_model(str(folder))).detach()
    assert sum(counted) > len(NAMES)
    counted.clear()
    forget_embeddings()
    again = ask(load_model(str(folder))).detach()
    assert torch.equal(again, first)
    # One class for each list of names; trees also try a few texts, with one template, with and without a projection.
    lists = {"antibodies": 2, "finetune, trees": 2}.get(reader, 1)
    assert sum(counted) <= lists * len(TEMPLATES) + (2 * 8 if reader == "finetune, trees" else 0)
    # What was kept is what would have been computed.
    for module in (class_embeddings.__module__, ProjectedTexts.__module__):
        monkeypatch.setattr(sys.modules[module], "kept_embeddings", lambda *given, **_: given[4](None))
    assert torch.equal(ask(load_model(str(folder))).detach(), first)


def test_readers_of_the_same_texts_share_them_and_so_do_models_whose_image_tower_alone_was_trained(
    folder: Path, counted: list[int]
) -> None:
    zero_shot(load_model(str(folder)), NAMES, TEMPLATES)
    vlm = load_model(str(folder))
    with torch.no_grad():
        vlm.model.visual.proj.mul_(1.5)  # type: ignore[union-attr, operator]
    write_clip_folder(vlm, folder.parent / "tuned")
    vlm = load_model(str(folder.parent / "tuned"))
    assert vlm.fingerprint != load_model(str(folder)).fingerprint
    for reader in ("a classifier", "finetune", "validation", "immunize", "detect"):
        counted.clear()
        READERS[reader](vlm)
        assert sum(counted) == len(TEMPLATES), reader


def test_what_a_caller_does_to_them_changes_nothing_that_is_kept(folder: Path) -> None:
    vlm = load_model(str(folder))
    first = class_embeddings(vlm, NAMES, TEMPLATES)
    before = first.clone()
    first.zero_()
    assert torch.equal(class_embeddings(vlm, NAMES, TEMPLATES), before)


def test_they_can_be_trained_against_whoever_asked_first(folder: Path) -> None:
    with torch.inference_mode():
        class_embeddings(load_model(str(folder)), NAMES, TEMPLATES)
    weight = torch.ones(24, requires_grad=True)
    (weight * class_embeddings(load_model(str(folder)), NAMES, TEMPLATES)).sum().backward()
    assert weight.grad is not None


def test_a_text_tower_in_training_is_never_asked_of_the_cache(folder: Path, counted: list[int]) -> None:
    vlm = load_model(str(folder))
    validation = validation_of(vlm, in_training=True)
    for _ in range(2):
        counted.clear()
        validation()
        assert sum(counted) == len(NAMES) * len(TEMPLATES)
    assert not cache_file("x").parent.exists()


def test_another_number_of_threads_is_another_key(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    vlm = load_model(str(folder))
    class_embeddings(vlm, NAMES, TEMPLATES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1234)
    class_embeddings(vlm, NAMES, TEMPLATES)
    assert len(list(cache_file("x").parent.glob("*.safetensors"))) == 2


class Halting(VLM):
    """Dies in one of its batches."""

    def __init__(self, last: int = 10**6) -> None:
        super().__init__(spec="halting", image_size=4, logit_scale=1.0)
        self.last, self.encoded = last, [0][:0]

    def _image_features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)

    def _text_features(self, texts: list[str]) -> Tensor:
        if len(self.encoded) == self.last:
            os._exit(3)
        self.encoded.append(len(texts))
        return torch.tensor([[1.0, len(text), sum(text.encode()) % 97] for text in texts])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process by fork")
def test_a_killed_encoding_of_trees_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"thing {i}" for i in range(20)]
    monkeypatch.setattr(sys.modules[ProjectedTexts.__module__], "_TEXTS_PER_PASS", 6)
    monkeypatch.setattr(sys.modules[class_embeddings.__module__], "_TEXTS_PER_BATCH", 6)
    child = os.fork()
    if child == 0:
        try:
            ProjectedTexts(Halting(last=6), names, TEMPLATES)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    vlm = Halting()
    found = ProjectedTexts(vlm, names, TEMPLATES)()
    assert vlm.encoded == [3, *[6] * 5]  # the first class, and five of ten batches
    assert torch.equal(
        found, torch.stack([Halting().embed_text([t.format(n) for t in TEMPLATES]).mean(0) for n in names])
    )


# Which weights decide the texts


def moved(vlm: VLM) -> list[tuple[str, bool, bool]]:
    """Change one tensor after the other; return whether the texts changed, and whether their digest did."""
    texts, known = ["a photo of a cat", "two dogs"], vlm.text_fingerprint
    before, found = vlm.encode_text(texts), []
    for name, value in vlm.state_dict().items():
        if value.is_floating_point():
            kept = value.clone()
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            found.append((name, not torch.equal(vlm.encode_text(texts), before), vlm.text_fingerprint != known))
            value.copy_(kept)
    return found


def small(kind: str, folder: Path, make_clip: Callable[..., Path]) -> VLM:
    if kind == "open_clip":
        return load_model(str(make_clip()))
    if kind == "open_clip, text in a part":
        text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True, "init_logit_bias": -10}
        return load_model(str(make_clip("custom", model_cfg=config)))
    pytest.importorskip("transformers", minversion="4.57")
    from .transformers_folders import make

    make(folder / kind, kind)
    return load_model(f"transformers:{folder / kind}")


@pytest.mark.parametrize("kind", ["open_clip", "open_clip, text in a part", "clip", "siglip"])
def test_the_digest_of_the_text_tower_covers_what_the_texts_need_and_no_image_tower(
    kind: str, tmp_path: Path, save_clip: Callable[..., Path]
) -> None:
    found = moved(small(kind, tmp_path, save_clip))
    assert [name for name, texts, digest in found if texts and not digest] == []
    assert any(texts for _, texts, _ in found)
    visual = [digest for name, _, digest in found if name.startswith(("model.visual", "model.vision_model"))]
    assert visual
    assert not any(visual)


def test_defences_share_the_texts_of_their_encoder_if_they_hand_them_on_bit_for_bit(folder: Path) -> None:
    base = load_model(str(folder))
    adapted = AdaptedVLM(base, Adapter(24, 4))
    behind = apply_operations(base, [Operation("bits", ("3",))])
    twice = [SmoothedVLM(base, 0.25), PurifiedVLM(base, None, None)]
    for vlm in (adapted, behind):
        assert vlm.text_fingerprint == base.text_fingerprint
        assert torch.equal(
            class_embeddings(vlm, NAMES, TEMPLATES, cache=False), class_embeddings(base, NAMES, TEMPLATES)
        )
    assert {vlm.text_fingerprint for vlm in twice} == {twice[0].text_fingerprint} != {base.text_fingerprint}
    first, second = (class_embeddings(vlm, NAMES, TEMPLATES, cache=False) for vlm in twice)
    assert torch.equal(first, second)
