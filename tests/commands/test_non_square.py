"""Models whose images are higher than wide or wider than high, through every command, and as open_clip frames them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor

import robustvlm as rv
from robustvlm.certify import resize_norm, source_norm
from robustvlm.core.framing import RESIZE_MODES, Framing, to_pixels
from robustvlm.core.size import as_size
from robustvlm.data import open_data
from robustvlm.data.emoji import ASSETS
from robustvlm.defenses import load_classifier, load_pipeline, smooth
from robustvlm.defenses.zoo.base import DEFENCES
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.clip import preprocessing_of
from robustvlm.report.methods import methods_of

HEIGHT, WIDTH, EACH = 16, 24, 4
COLOURS = {"a red": (200, 60, 60), "b green": (60, 200, 60), "c blue": (60, 60, 200)}
CONFIG = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": [HEIGHT, WIDTH], "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 4096, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.3, 0.2], "interpolation": "bilinear"},
}
OWN = """
import torch


class Encoder(torch.nn.Module):
    image_size, logit_scale = [16, 24], 20.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Linear(3 * 16 * 24, 6)

    def encode_image(self, pixels):
        return self.image(pixels.flatten(1) - 0.5)

    def encode_text(self, texts):
        return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts])


class Channels(torch.nn.Module):
    image_size, resize_mode = (24, 16), "longest"

    def forward(self, pixels):
        return 30 * pixels[:, :, 8:].mean((2, 3))


class Odd(Encoder):
    image_size = (16, 24.5)
"""


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Framing


SIDE = st.integers(1, 40)


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(SIDE, SIDE),
    shape=st.tuples(SIDE, SIDE),
    mode=st.sampled_from(RESIZE_MODES),
    interpolation=st.sampled_from(["bicubic", "bilinear", "random"]),
)
def test_pixels_are_those_of_open_clip(
    size: tuple[int, int], shape: tuple[int, int], mode: str, interpolation: str
) -> None:
    config = {"size": size, "mean": (0.0,) * 3, "std": (1.0,) * 3, "fill_color": 77}
    config |= {"resize_mode": mode, "interpolation": interpolation}
    image = noise(*shape)
    framing, _, _ = preprocessing_of(config, "m")
    found = to_pixels(image, framing)
    assert found.shape == (3, *size)
    try:
        wanted = image_transform_v2(PreprocessCfg(**config), is_train=False)(image)
    except ValueError:  # open_clip makes a side of a long strip zero pixels long
        assert mode == "longest"
    else:
        assert torch.equal(found, wanted)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(SIDE, SIDE), shape=st.tuples(SIDE, SIDE), share=st.floats(0.5, 1.0))
def test_a_larger_image_is_scaled_and_cropped_as_timm_does(
    size: tuple[int, int], shape: tuple[int, int], share: float
) -> None:
    how = {"interpolation": "bilinear", "crop_pct": share, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = create_transform(input_size=(3, *size), is_training=False, crop_mode="center", **how)
    scaled = [math.floor(side / share) for side in size]
    framing = Framing(size, "bilinear", short_side=0 if tuple(scaled) == size else scaled)
    image = noise(*shape)
    assert torch.equal(to_pixels(image, framing), transform(image))


@pytest.mark.parametrize("shape", [(900, 7), (7, 900), (31, 900)])
def test_of_a_long_strip_only_the_middle_is_made(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.linspace(0, 255, 3 * shape[0] * shape[1]).reshape(shape[1], shape[0], 3).astype("uint8"))
    framing = Framing((14, 22), short_side=(17, 26))
    whole = to_pixels(image, framing)
    monkeypatch.setattr("robustvlm.core.framing._STRIP", 1)
    assert (to_pixels(image, framing) - whole).abs().max() <= 0.03


def test_equal_sides_are_one_number_and_others_have_an_order() -> None:
    assert Framing((7, 7)) == Framing([7, 7]) == Framing(7)
    assert Framing((7, 7), short_side=(9, 9)).options()["short_side"] == 9
    assert Framing((7, 9)) != Framing((9, 7))
    assert Framing((7, 9)).at((7, 9)) == Framing((7, 9))
    for size in ((7, 9), 8):
        with pytest.raises(UserError, match=r"only a square can be taken at another size"):
            Framing((9, 7)).at(size)
    with pytest.raises(UserError, match=r"only as a square: the model's images have 8 pixels"):
        Framing(8).at((7, 9))
    for wrong in ((7, 0), (1, 2, 3), (7, 8.5), "7x9", (True, 7), None):
        with pytest.raises(UserError, match=r"the image size must be"):
            as_size(wrong)
    with pytest.raises(UserError, match=r"at least the image size, got 10x8 with 'shortest' and 7x9 pixels"):
        Framing((7, 9), short_side=(10, 8))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(SIDE, SIDE),
    shape=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    mode=st.sampled_from(RESIZE_MODES),
    seed=st.integers(0, 99),
)
def test_no_change_of_an_image_grows_by_more_than_the_norm(
    size: tuple[int, int], shape: tuple[int, int], mode: str, seed: int
) -> None:
    from robustvlm.core.framing import covering, fitting

    framing, (height, width) = Framing(size, resize_mode=mode), shape
    to = {"squash": size, "longest": fitting(height, width, size), "shortest": covering(height, width, framing.scaled)}
    change = torch.randn(1, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if seed % 2:  # smooth changes are what shrinking keeps
        change = change.mean().expand_as(change)
    grown = torch.nn.functional.interpolate(change, to[mode], mode="bicubic", antialias=True, align_corners=False)
    assert grown.norm() <= resize_norm(width, height, framing) * change.norm() * (1 + 1e-6)


def test_radii_at_the_source_are_stated_for_images_of_the_very_size() -> None:
    for mode in RESIZE_MODES:
        framing = Framing((HEIGHT, WIDTH), resize_mode=mode)
        assert source_norm(WIDTH, HEIGHT, framing) == 1.0
        assert source_norm(HEIGHT, WIDTH, framing) is None
        assert source_norm(HEIGHT, HEIGHT, framing) is source_norm(WIDTH, WIDTH, framing) is None
        assert source_norm(2 * WIDTH, 2 * HEIGHT, framing) is None
    assert source_norm(WIDTH, HEIGHT, Framing((HEIGHT, WIDTH), short_side=(HEIGHT, WIDTH + 1))) is None


# Models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, a model of open_clip and modules of one's own, and the process in it."""
    folder = tmp_path_factory.mktemp("non_square")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(EACH):
            shape = (WIDTH, HEIGHT) if index == 0 else (20 + 5 * index, 30)
            speckled = 0.8 * np.array(colour) + 0.2 * np.asarray(noise(*shape, seed=10 * number + index))
            Image.fromarray(speckled.astype(np.uint8)).save(folder / "images" / name / f"{index}.png")
    (folder / "others/grey").mkdir(parents=True)
    for index in range(3):
        noise(20 + index, 30, seed=index).save(folder / "others/grey" / f"{index}.png")
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps(CONFIG))
    shutil.copy(ASSETS / "tiny" / "bpe_4096.txt.gz", folder / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder / 'clip'}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "clip/open_clip_model.safetensors")
    (folder / "non_square.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_dir", lambda *_: str(folder / "cache"))
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


def options(place: Path, **more: Any) -> dict[str, Any]:
    return {"data": f"imagefolder:{place / 'images'}", "device": "cpu", "out": place / "runs"} | more


def test_a_folder_of_open_clip_sees_what_open_clip_shows_it(place: Path) -> None:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{place / 'clip'}")
    vlm = load_model(str(place / "clip"))
    # Where the sides differ open_clip takes its bicubic filter, whatever the config says.
    assert vlm.framing == Framing((HEIGHT, WIDTH), "bicubic")
    for shape in ((60, 31), (31, 60), (WIDTH, HEIGHT)):
        image = noise(*shape)
        with torch.no_grad():
            wanted = torch.nn.functional.normalize(model.eval().encode_image(preprocess(image)[None]), dim=-1)
        torch.testing.assert_close(vlm.encode_image(to_pixels(image, vlm.framing)[None]), wanted, atol=1e-5, rtol=0)


def test_another_size_is_refused_in_one_line(place: Path) -> None:
    model = load_classifier("non_square:Channels", list(COLOURS), [])
    smoothed = load_model("non_square:Encoder")
    for ask in (model, load_classifier("non_square:Channels+vote:2", list(COLOURS), []), smooth(smoothed, 0.1, 2)):
        with pytest.raises(UserError, match=r"^images must have (24x16|16x24) pixels \(height x width\).*got 20x20"):
            ask(torch.rand(2, 3, 20, 20))
    with pytest.raises(UserError, match=r"must have 16x24 pixels .* got 24x16"):
        smoothed.encode_image(torch.rand(1, 3, 24, 16))
    with pytest.raises(UserError, match=r"'non_square:Odd': image_size must be .*got \(16, 24.5\)"):
        load_model("non_square:Odd")
    with pytest.raises(UserError, match=r"resolution is the side of a square, .* 16x24 pixels .* leave it out, got 64"):
        rv.attack("non_square:Encoder", resolution=64, **options(place))


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.usefixtures("place")
def test_every_defence_stands_in_front_of_one(name: str) -> None:
    kind = DEFENCES[name]
    written = str(kind()) if kind.explicit else name
    base = load_classifier("non_square:Encoder", list(COLOURS), ["{}"], cache=False)
    off, on = (
        load_classifier(f"non_square:Encoder+{text}", list(COLOURS), ["{}"], cache=False)
        for text in (f"{name}:{kind.off}", written)
    )
    x = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))

    def asked(model: torch.nn.Module, images: Tensor) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(images)

    assert torch.equal(asked(off, x), asked(base, x))
    found = asked(on, x)
    assert found.shape == (2, 3)
    assert found.isfinite().all()
    assert torch.allclose(asked(on, x.flip(0)), found.flip(0), atol=2e-4)
    given = x.clone().requires_grad_()
    torch.manual_seed(0)
    on(given).logsumexp(1).sum().backward()
    assert given.grad is not None
    assert given.grad.shape == x.shape


# Commands


def test_attack_evaluate_and_predict(place: Path) -> None:
    chosen = options(place, name="attack", eps="8/255", attack="apgd-ce,square:queries=9", steps=2, limit=3)
    run = rv.attack(str(place / "clip"), **chosen)
    assert run.manifest["config"]["resolution"] == [HEIGHT, WIDTH]
    assert run.manifest["model"]["image_size"] == [HEIGHT, WIDTH]
    assert {"image features", "text features"} <= run.manifest["probe"]["parts"].keys()
    assert f"at {HEIGHT} x {WIDTH} pixels" in methods_of(run.manifest).text
    # A pair of sides comes back from the manifest as a list, and the run is the same one.
    assert rv.attack(str(place / "clip"), **chosen).manifest["id"] == run.manifest["id"]
    assert rv.evaluate("non_square:Channels", data=chosen["data"], device="cpu").accuracy.value == 1.0
    rows = rv.predict("non_square:Channels", place / "images", classes=list(COLOURS))
    assert len(rows) == 3 * EACH
    assert [row.class_name for row in rows] == [Path(row.image).parent.name for row in rows]


@pytest.mark.parametrize("claim", ["feature", "class"])
def test_certify(place: Path, claim: str) -> None:
    more = {"claim": claim, "sigma": 0.5, "samples": 200}
    run = rv.certify(str(place / "clip"), **options(place, name=f"certify-{claim}", **more))
    assert run.config.resolution == (HEIGHT, WIDTH)
    assert "16 x 24" in json.dumps(run.manifest["plan"])
    for row in run.rows.to_pylist():
        own_size = row["image_id"].endswith("0.png")
        assert row["resize_norm"] == (1.0 if own_size else None)
        assert json.loads(row["certificate"])["provenance"]["resize_norm"] == row["resize_norm"]


def test_detect_and_judge(place: Path) -> None:
    known, others = (f"imagefolder:{place / name}" for name in ("images", "others"))
    run = rv.detect(str(place / "clip"), id=known, ood=others, device="cpu", out=place / "runs", draws=100)
    assert run.manifest["model"]["image_size"] == [HEIGHT, WIDTH]
    models = ",".join(f"{place / 'clip'}+{operator}" for operator in ("ttp:views=2", "randpad:1.3"))
    run = rv.judge(models, **options(place, name="judge", eps="4/255", steps=1, queries=2, limit=2, draws=3))
    assert len(run.summary.models) == 3


def test_what_is_trained_keeps_the_size(place: Path) -> None:
    own = load_model(str(place / "clip"))
    few = {"steps": 2, "batch_size": 4, "val_limit": 3}
    tuned = rv.finetune(
        str(place / "clip"),
        **options(place, name="tuned", method="tecoa", eps="2/255", inner_steps=1, val_steps=1, **few),
    )
    again = load_model(str(tuned.folder))
    assert again.framing == own.framing
    assert again.fingerprint != own.fingerprint
    cleaned = rv.purify(str(place / "clip"), **options(place, name="pure", sigma=[0.25], mapper_steps=2, **few))
    vlm = load_pipeline(str(cleaned.folder))
    assert vlm.framing == own.framing
    assert vlm.encode_image(torch.rand(2, 3, HEIGHT, WIDTH)).shape == (2, 12)


def test_a_model_that_transformers_cannot_be_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"takes images of 16x24 pixels, and CLIPVisionModel knows squares only"):
        rv.export(str(place / "clip"), place / "exported", to="transformers")


def test_tensors_of_a_source_have_the_size(place: Path) -> None:
    images, _, _ = open_data(options(place)["data"]).tensors((HEIGHT, WIDTH), limit=2)
    assert images.shape == (2, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("spec", ["tiny+vote:2", "tiny+tte:2", "tiny+smooth:0.1:2", "tiny"])
def test_a_square_model_stretches_no_image_whatever_stands_around_it(spec: str) -> None:
    model = load_classifier(spec, ["apple", "dog"], ["{}"], cache=False)
    with pytest.raises(UserError, match="images must be square, got 48x64"):
        model(torch.rand(1, 3, 48, 64))


def test_a_size_that_is_no_whole_number_is_one_line() -> None:
    for wrong in (torch.tensor(64.0), torch.tensor([16, 24]), np.array([64, 64]), True, (1, 2, 3), 2.5):
        with pytest.raises(UserError, match="must be a whole number of pixels"):
            as_size(wrong)
    assert Framing(64).at((32, 32)) == Framing(32)  # type: ignore[arg-type]
