"""Models of transformers handed on: to transformers itself, and to open_clip where that has the architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", minversion="4.57")

import transformers

import robustvlm as rv
from robustvlm.commands.export import export
from robustvlm.data import to_pixels
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.models.transformers_vlm import TowerVLM, TransformersVLM
from tests.models.transformers_folders import SIDE, make

TEXTS = ["a photo of a cat", "two dogs", "the red bike and a border collie on a train", "x"]


def pictures(count: int = 3, side: int = SIDE) -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def pixels_of(vlm: VLM) -> torch.Tensor:
    return torch.stack([to_pixels(image, vlm.framing) for image in pictures()])


def logits(vlm: VLM) -> torch.Tensor:
    return vlm.logit_scale * vlm.encode_image(pixels_of(vlm)) @ vlm.encode_text(TEXTS).T


def of_library(folder: Path, name: str, **words: Any) -> torch.Tensor:
    """Return the logits that transformers gives with nothing but the folder."""
    model, found = getattr(transformers, name).from_pretrained(str(folder), output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    given = dict(tokenizer(TEXTS, truncation=True, return_tensors="pt", **words))
    wanted = ("input_ids",) if name.startswith("Siglip") else ("input_ids", "attention_mask")
    images = processor(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**{key: given[key] for key in wanted}, **images).logits_per_image


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("clip", "CLIPModel", {"padding": True, "max_length": 16}),
        ("siglip", "SiglipModel", {"padding": "max_length", "max_length": 12}),
        ("siglip2", "Siglip2Model", {"padding": "max_length", "max_length": 12}),
        ("altclip", "AltCLIPModel", {"padding": True, "max_length": 16}),
    ],
)
def test_a_pair_is_read_back_by_its_library(kind: str, name: str, words: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path / "m", kind)
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    export(vlm.spec, tmp_path / "out", to="transformers")
    ours = logits(vlm)
    assert ours.std() > 0.3
    bias = vlm.logit_bias or 0.0
    torch.testing.assert_close(of_library(tmp_path / "out", name, **words), ours + bias, atol=1e-5, rtol=1e-5)
    back = load_model(f"transformers:{tmp_path / 'out'}")
    assert back.fingerprint == vlm.fingerprint
    card = (tmp_path / "out/README.md").read_text()
    assert f'{name}.from_pretrained("FOLDER")' in card
    assert vlm.fingerprint in card


@pytest.mark.parametrize("kind", ["clip_vision_projected", "vit"])
def test_a_tower_is_written_without_the_texts_of_the_other_model(kind: str, tmp_path: Path) -> None:
    made = make(tmp_path / "m", kind)
    vlm = load_model(f"transformers:{tmp_path / 'm'}")
    export(vlm.spec, tmp_path / "out", to="transformers")
    back = load_model(f"transformers:{tmp_path / 'out'}")
    assert back.fingerprint == vlm.fingerprint
    assert torch.equal(back.encode_image(pixels_of(vlm)), vlm.encode_image(pixels_of(vlm)))
    assert f"{type(made).__name__}.from_pretrained" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match="image tower of transformers, and open_clip has no place") as caught:
        export(vlm.spec, tmp_path / "other")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of transformers, `base`, photographs, and a run `ft` that fine-tuned it."""
    place = tmp_path_factory.mktemp("tuned")
    make(place / "base", "clip")
    for number, image in enumerate(pictures(24)):
        folder = place / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    # A data folder that is named from elsewhere and an absolute run folder: no test changes where it stands.
    rv.finetune(
        f"transformers:{place / 'base'}",
        data=f"imagefolder:{place / 'photos'}",
        method="fare",
        steps=2,
        batch_size=4,
        inner_steps=1,
        eps="2/255",
        lr=1e-2,
        out=place / "runs",
        name="ft",
    )
    return place


def test_a_fine_tuned_model_goes_to_both(tuned: Path, tmp_path: Path) -> None:
    import open_clip

    vlm, base = load_pipeline(str(tuned / "runs/ft")), load_model(f"transformers:{tuned / 'base'}")
    ours = logits(vlm)
    assert (ours - logits(base)).abs().max() > 1e-3  # else the base's weights would do
    export(tuned / "runs/ft", tmp_path / "hf", to="transformers")
    found = of_library(tmp_path / "hf", "CLIPModel", padding=True, max_length=16)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)

    export(tuned / "runs/ft", tmp_path / "oc")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'oc'}")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(one) for one in pictures()]), normalize=True)
        theirs = model.logit_scale.exp() * images @ model.encode_text(tokenizer(TEXTS), normalize=True).T
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    again = load_model(str(tmp_path / "oc"))
    torch.testing.assert_close(logits(again), ours, atol=1e-5, rtol=1e-5)
    assert again.cut_tokens(TEXTS) == vlm.cut_tokens(TEXTS)
    for out in ("hf", "oc"):
        card = (tmp_path / out / "README.md").read_text()
        assert "| method | fare |" in card
        assert f"It began with `transformers:{tuned / 'base'}`" in card


def test_half_measured_and_again(tuned: Path, tmp_path: Path) -> None:
    spec, out = str(tuned / "runs/ft"), tmp_path / "out"
    data = f"imagefolder:{tuned / 'photos'}"
    rv.attack(spec, data=data, eps="1/255", attack="pgd:steps=1", limit=4, out=tmp_path, name="whole")
    export(spec, out, to="transformers", half=True, evaluated=[tmp_path / "whole"])
    config = json.loads((out / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"float16"}
    assert "Of these weights, before they were rounded to 16 bits, on 4 images" in (out / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "config.json").unlink()
    export(spec, out, to="transformers", half=True, evaluated=[tmp_path / "whole"])  # made anew
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    half = f"transformers:{out}"
    rv.attack(half, data=data, eps="1/255", attack="pgd:steps=1", limit=4, out=tmp_path, name="half")
    export(spec, out, to="transformers", half=True, evaluated=[tmp_path / "half"])
    assert "Of these weights, on 4 images" in (out / "README.md").read_text()
    (tuned / "base/added_tokens.json").write_text("{}")
    try:
        vlm = load_model(f"transformers:{tuned / 'base'}")
        assert isinstance(vlm, TransformersVLM)
        (tuned / "base/added_tokens.json").unlink()
        from robustvlm.models.export import rewritten

        with pytest.raises(UserError, match=r"changed since .* was read from it"):
            rewritten(vlm)
    finally:
        (tuned / "base/added_tokens.json").unlink(missing_ok=True)


def test_what_open_clip_cannot_express_is_refused(tmp_path: Path) -> None:
    for kind, said in (("siglip", "it is a SiglipModel"), ("altclip", "it is a AltCLIPModel")):
        make(tmp_path / kind, kind)
        with pytest.raises(UserError, match=said) as caught:
            export(f"transformers:{tmp_path / kind}", tmp_path / "out")
        assert "export it with to=transformers" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    make(tmp_path / "clip", "clip")
    processor = tmp_path / "clip/preprocessor_config.json"
    processor.write_text(re.sub(r'"shortest_edge": \d+', '"shortest_edge": 20', processor.read_text()))
    with pytest.raises(UserError, match="images are scaled to 20 pixels and cropped to 16"):
        export(f"transformers:{tmp_path / 'clip'}", tmp_path / "out")


# A tower beside the texts of a model that need not share its space


def test_a_tower_whose_space_nothing_vouches_for_is_said_in_every_run(tuned: Path, tmp_path: Path) -> None:
    make(tmp_path / "tower", "clip_vision_projected")
    spec = f"transformers:{tmp_path / 'tower'}@transformers:{tuned / 'base'}"
    vlm = load_model(spec)
    assert isinstance(vlm, TowerVLM)
    said = "nothing shows that the image tower"
    data = f"imagefolder:{tuned / 'photos'}"
    found = rv.attack(f"{spec}+smooth:0.1:2", data=data, eps="1/255", attack="pgd:steps=1", limit=2, out=tmp_path)
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert [remark for remark in manifest["remarks"] if remark.startswith(said)]
    assert said in (found.folder / "report.html").read_text()
    assert any(remark.startswith(said) for remark in rv.evaluate(spec, data=data, limit=2, out=tmp_path).remarks)
    assert not load_model(f"transformers:{tuned / 'base'}").remarks
