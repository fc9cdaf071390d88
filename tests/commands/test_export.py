"""Models handed on: folders that open_clip and transformers read by themselves, and what their cards say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import robustvlm as rv
from robustvlm.commands.export import export
from robustvlm.commands.export.card import block, code, licence_of, text
from robustvlm.data import to_pixels
from robustvlm.errors import UserError
from robustvlm.models import load_model

SIDE = 16
VIT: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TEXTS = ["a photo of a cat", "Two DOGS  here", "don't stop", "word " * 40]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write an open_clip folder with random weights that tell inputs apart."""
    import open_clip

    def write(name: str = "m", seed: int = 0, model: dict[str, Any] = VIT, **preprocess: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "shortest", **preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": settings}))
        torch.manual_seed(seed)
        made = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        with torch.no_grad():
            for value in made.parameters():
                if value.ndim >= 2:
                    value.normal_(std=0.2)
        save_file(made.state_dict(), folder / "open_clip_model.safetensors")
        return folder

    return write


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return front matter and body of a model card."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


@pytest.mark.parametrize(
    ("model", "preprocess", "activation"),
    [
        (VIT, {}, "gelu"),
        ({**VIT, "quick_gelu": True}, {"resize_mode": "squash", "interpolation": "bilinear"}, "quick_gelu"),
    ],
)
def test_transformers_itself_gives_our_logits(
    save: Callable[..., Path], tmp_path: Path, model: dict[str, Any], preprocess: dict[str, Any], activation: str
) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.57")
    source, out = save(model=model, **preprocess), tmp_path / "out"
    export(str(source), out, to="transformers")
    assert json.loads((out / "config.json").read_text())["vision_config"]["hidden_act"] == activation
    theirs, found = transformers.CLIPModel.from_pretrained(str(out), output_loading_info=True, dtype=torch.float32)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    processor = transformers.CLIPProcessor.from_pretrained(str(out))
    given = processor(text=TEXTS, images=pictures(), padding=True, truncation=True, return_tensors="pt")
    vlm = load_model(str(source))
    pixels = torch.stack([to_pixels(image, vlm.framing) for image in pictures()])
    ours = vlm.logit_scale * vlm.encode_image(pixels) @ vlm.encode_text(TEXTS).T
    with torch.no_grad():
        wanted = theirs.eval()(**{k: v for k, v in given.items() if k != "token_type_ids"}).logits_per_image
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)

    back = load_model(f"transformers:{out}")
    assert back.framing == vlm.framing
    assert back.logit_scale == pytest.approx(vlm.logit_scale)
    wide = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(back.encode_image(wide), vlm.encode_image(wide), atol=1e-6, rtol=0)
    torch.testing.assert_close(back.encode_text(TEXTS), vlm.encode_text(TEXTS), atol=1e-6, rtol=0)
    assert back.cut_tokens(TEXTS) == vlm.cut_tokens(TEXTS)


def test_open_clip_itself_reads_the_other(save: Callable[..., Path], tmp_path: Path) -> None:
    import open_clip

    source, out = save(), tmp_path / "out"
    export(str(source), out)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    vlm = load_model(str(source))
    pixels = torch.stack([to_pixels(image, vlm.framing) for image in pictures()])
    with torch.no_grad():
        theirs = model.eval().encode_image(torch.stack([preprocess(image) for image in pictures()]), normalize=True)
    torch.testing.assert_close(theirs, vlm.encode_image(pixels), atol=1e-6, rtol=1e-5)
    matter, _ = card_of(out)
    assert matter["library_name"] == "open_clip"


def test_an_export_is_made_anew_when_cut_short_and_stays_when_whole(save: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="4.57")
    source, out = save(), tmp_path / "out"
    export(str(source), out, to="transformers")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    export(str(source), out, to="transformers")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    (out / "config.json").unlink()
    (out / "merges.txt").unlink()
    export(str(source), out, to="transformers")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {name: one[0] for name, one in before.items()}
    for other, half, to in (
        (source, True, "transformers"),
        (save("n", seed=1), False, "transformers"),
        (source, False, "open_clip"),
    ):
        with pytest.raises(UserError, match="choose another one to export to"):
            export(str(other), out, half=half, to=to)


def test_half_is_half(save: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="4.57")
    export(str(save()), tmp_path / "out", to="transformers", half=True)
    values = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in values.values()} == {torch.float16}
    assert load_model(f"transformers:{tmp_path / 'out'}").encode_text(["a cat"]).dtype == torch.float32


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_weights_that_half_cannot_hold_are_refused(save: Callable[..., Path], tmp_path: Path, to: str) -> None:
    if to == "transformers":
        pytest.importorskip("transformers", minversion="4.57")
    source = save()
    weights = load_file(source / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = -1e5
    save_file(weights, source / "open_clip_model.safetensors")
    name = "visual.proj" if to == "open_clip" else "visual_projection.weight"
    with pytest.raises(UserError, match=f"'{name}' holds a value of -100000, .* infinite: leave out half"):
        export(str(source), tmp_path / "out", to=to, half=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vision", "text_cfg", "preprocess", "said"),
    [
        ({}, {}, {"resize_mode": "longest"}, "pads images to a square"),
        ({"pool_type": "avg"}, {}, {}, "pools otherwise than by the class token"),
        ({"no_ln_pre": True}, {}, {}, "no layer norm before the first layer"),
        ({"ls_init_value": 0.1}, {}, {}, "'vision_model.encoder.layers.0.ls_1.gamma' has no counterpart"),
        ({}, {"no_causal_mask": True}, {}, "its text tower pools, looks ahead or projects otherwise"),
        ({}, {"pool_type": "last"}, {}, "its text tower pools, looks ahead or projects otherwise"),
    ],
)
def test_what_transformers_cannot_express_is_refused(
    save: Callable[..., Path], tmp_path: Path, vision: Any, text_cfg: Any, preprocess: Any, said: str
) -> None:
    pytest.importorskip("transformers", minversion="4.57")
    model = {**VIT, "vision_cfg": {**VIT["vision_cfg"], **vision}, "text_cfg": {**VIT["text_cfg"], **text_cfg}}
    with pytest.raises(UserError) as caught:
        export(str(save(model=model, **preprocess)), tmp_path / "out", to="transformers")
    assert said in str(caught.value)
    assert "export it with to=open_clip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its image tower is a ModifiedResNet"):
        export("tiny", tmp_path / "out", to="transformers")
    with pytest.raises(UserError, match="to is one of open_clip, transformers, got 'onnx'"):
        export("tiny", tmp_path / "out", to="onnx")
    with pytest.raises(UserError, match=r"more than a model of open_clip or transformers \(a Smoothed"):
        export("tiny+smooth:0.1", tmp_path / "out")


# The model card


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for number, image in enumerate(pictures()):
        (tmp_path / "photos" / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png")
    return f"imagefolder:{tmp_path / 'photos'}"


@pytest.fixture
def measured(save: Callable[..., Path], tmp_path: Path, photos: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with two runs of it: an attack and a certificate of the model smoothed."""
    monkeypatch.chdir(tmp_path)
    source = save()
    rv.attack(str(source), data=photos, eps="1/255,2/255", attack="pgd:steps=1", name="attacked")
    rv.certify(f"{source}+smooth:0.2", data=photos, claim="class", samples=120, name="certified")
    return source


def test_every_number_of_a_card_has_its_interval_and_its_command(measured: Path, tmp_path: Path) -> None:
    export(str(measured), tmp_path / "out", evaluated=["attacked", tmp_path / "runs/certified"])
    matter, body = card_of(tmp_path / "out")
    assert matter["license"] == "other"
    assert matter["license_name"] == "unknown"
    assert matter["pipeline_tag"] == "zero-shot-image-classification"
    assert "base_model" not in matter
    part = body[body.index("## Measured robustness") : body.index("## Limits")]
    summary = json.loads((tmp_path / "runs/attacked/summary.json").read_text())
    rows = [line for line in part.splitlines() if "%" in line and line.startswith("|")]
    rows = [line for line in rows if "interval" not in line]
    assert len(rows) >= 3 + len(json.loads((tmp_path / "runs/certified/summary.json").read_text())["at"])
    for line in rows:
        assert re.search(r"\| [\d.]+% \| [\d.]+\u2013[\d.]+% \| \d+ of \d+ \|$", line), line
    wanted = summary["per_eps"][1]["robust_accuracy"]
    assert any(f"{wanted['successes']} of {wanted['total']} |" in line and "2/255" in line for line in rows)
    assert "Of these weights, on 3 images" in part
    assert "Of these weights behind `+smooth:0.2:64`" in part
    for name in ("attacked", "certified"):
        assert json.loads((tmp_path / "runs" / name / "manifest.json").read_text())["command"] in part
    assert "wrong with probability at most 0.001" in part
    assert load_model(str(measured)).fingerprint in body


def test_runs_of_other_models_and_of_other_kinds_are_refused(
    measured: Path, save: Callable[..., Path], tmp_path: Path
) -> None:
    other = save("other", seed=1)
    for run in ("attacked", "certified"):
        with pytest.raises(UserError, match="measured another model") as caught:
            export(str(other), tmp_path / "out", evaluated=[run])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no run 'nothing'"):
        export(str(measured), tmp_path / "out", evaluated=["nothing"])
    rounded = tmp_path / "half"
    export(str(measured), rounded, evaluated=["attacked"], half=True)
    assert "Of these weights, before they were rounded to 16 bits, on 3 images" in card_of(rounded)[1]
    rv.attack(str(rounded), data=f"imagefolder:{tmp_path / 'photos'}", eps="1/255", attack="pgd:steps=1", name="again")
    export(str(measured), rounded, evaluated=["again"], half=True)  # the card is written anew
    assert "Of these weights, on 3 images" in card_of(rounded)[1]
    with pytest.raises(UserError, match="measured another model"):
        export(str(measured), tmp_path / "whole", evaluated=["again"])


def test_a_card_without_runs_says_so(save: Callable[..., Path], tmp_path: Path) -> None:
    source = save()
    export(str(source), tmp_path / "out")
    _, body = card_of(tmp_path / "out")
    part = body[body.index("## Measured robustness") : body.index("## Limits")]
    assert "Nothing was measured on these weights" in part
    assert "%" not in part
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    export(str(source), tmp_path / "mine")
    matter, body = card_of(tmp_path / "mine")
    assert matter["license"] == "mit"
    assert "names the licence `mit`" in body


def test_a_card_says_how_a_model_was_trained(
    tmp_path: Path, photos: str, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(pictures(24)):
        image.save(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"more{number}.png")
    base = save()
    rv.finetune(
        str(base),
        data=photos,
        method="fare",
        steps=1,
        batch_size=2,
        inner_steps=1,
        eps="2/255",
        name="ft",
    )
    export("runs/ft", tmp_path / "out")
    matter, body = card_of(tmp_path / "out")
    assert "adversarial-robustness" in matter["tags"]
    for wanted in (
        "| method | fare |",
        "| its radius | 2/255 |",
        "| seed | 0 |",
        f"It began with `{base}`, fingerprint `",
    ):
        assert wanted in body


def test_a_card_claims_no_attack_that_nobody_made(
    tmp_path: Path, photos: str, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(pictures(24)):
        image.save(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"more{number}.png")
    base = str(save())
    rv.finetune(base, data=photos, method="clean", steps=1, batch_size=2, val_steps=3, name="control")
    rv.soup([base, base], name="mean")
    rv.soup([base, base], val=photos, method="greedy", val_steps=2, name="chosen")
    export("runs/control", tmp_path / "control")
    matter, body = card_of(tmp_path / "control")
    assert "adversarial-robustness" not in matter["tags"]
    assert "attack in training" not in body
    assert "| norm of the attack that validated | Linf |" in body
    assert "| its steps | 3 |" in body
    assert "inner attack" not in (tmp_path / "runs" / "control" / "report.html").read_text("utf-8")
    export("runs/mean", tmp_path / "mean")
    body = card_of(tmp_path / "mean")[1]
    assert "| method | uniform |" in body
    for wrong in ("norm of", "its radius", "images used", "chosen by"):
        assert wrong not in body
    export("runs/chosen", tmp_path / "chosen")
    body = card_of(tmp_path / "chosen")[1]
    assert "| data it was measured on |" in body
    assert "| norm of the attack that validated | Linf |" in body
    assert "| chosen by | robust |" in body


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    assert text("# a\n| b [c](d) <img> **e**") == r"\# a \| b \[c\]\(d\) &lt;img&gt; \*\*e\*\*"
    assert code("a ``` b") == "```` a ``` b ````"
    assert block("```\nrm", "sh").startswith("````sh\n")
    assert block("x").endswith("\n```")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nx: y: [\n---\n")
    assert licence_of(str(tmp_path))[0] == "mit"
    (tmp_path / "README.md").write_text('---\nlicense: "mit\\nbase_model: evil"\n---\n')
    assert licence_of(str(tmp_path))[0] is None
