"""Every image reaches an open_clip model as open_clip itself would bring it there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from robustvlm.core.framing import RESIZE_MODES, Framing, to_pixels
from robustvlm.data.decode import to_rgb
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.clip import preprocessing_of, settings_of

SHAPES = {"wide": (150, 31), "tall": (29, 140), "tiny": (3, 2), "square": (50, 50), "long strip": (400, 9)}
TAGS = open_clip.list_pretrained()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def ours(image: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    framing, mean, std = preprocessing_of(config, "m")
    pixels = to_pixels(image, framing)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def theirs(image: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    return image_transform_v2(PreprocessCfg(**config), is_train=False)(image)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_every_mode_is_pixel_exact(shape: str, mode: str, interpolation: str) -> None:
    for size in (7, 32):
        config: dict[str, Any] = {"size": size, "mean": (0.0,) * 3, "std": (1.0,) * 3, "fill_color": 77}
        config |= {"resize_mode": mode, "interpolation": interpolation}
        try:
            wanted = theirs(noise(*SHAPES[shape]), config)
        except ValueError:  # open_clip makes a side of a long strip zero pixels long
            assert ours(noise(*SHAPES[shape]), config).shape == (3, size, size)
            continue
        assert torch.equal(ours(noise(*SHAPES[shape]), config), wanted)


def odd(kind: str) -> Image.Image:
    """Return a wide image of an odd pixel format."""
    image = noise(90, 40)
    if kind == "palette":
        return image.quantize(64)
    if kind == "cmyk":
        return image.convert("CMYK")
    if kind == "16 bit":
        return Image.fromarray(np.linspace(0, 65535, 90 * 40).reshape(40, 90).astype(np.uint16))
    exif = image.getexif()
    exif[0x112] = 6
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize("kind", ["palette", "cmyk", "16 bit", "turned"])
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_odd_formats_are_the_same_once_they_are_rgb(kind: str, mode: str) -> None:
    config: dict[str, Any] = {"size": 24, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": mode}
    image = to_rgb(odd(kind))
    assert (ours(image, config) - theirs(image, config)).abs().max() < 1e-6


@pytest.mark.parametrize("group", range(4))
def test_the_preprocessing_of_every_published_tag(group: int) -> None:
    seen: dict[str, None] = {}
    for name, tag in TAGS[group::4]:
        size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
        config = {"size": size, **settings_of(get_pretrained_cfg(name, tag))}
        if str(config) in seen:
            continue
        seen[str(config)] = None
        for shape in ("wide", "tall"):
            image = noise(*SHAPES[shape])
            assert (ours(image, config) - theirs(image, config)).abs().max() < 1e-5, (name, tag)
    assert len(TAGS) < 100 or seen  # a release without a list would test nothing


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_loaded_folder_sees_what_open_clip_shows_it(mode: str, save_clip: Callable[..., Path]) -> None:
    folder = save_clip(
        mode, mean=[0.2, 0.5, 0.7], std=[0.3, 0.2, 0.9], interpolation="bilinear", resize_mode=mode, size=99, mode="RGB"
    )
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    vlm = load_model(str(folder))
    for width, height in SHAPES.values():
        image = noise(width, height)
        if mode == "longest" and max(width, height) > 32 * min(width, height):
            continue
        with torch.no_grad():
            wanted = torch.nn.functional.normalize(model.eval().encode_image(preprocess(image)[None]), dim=-1)
        assert torch.allclose(vlm.encode_image(to_pixels(image, vlm.framing)[None]), wanted, atol=1e-5)


def test_the_mode_is_part_of_the_identity_and_of_what_is_handed_on(save_clip: Callable[..., Path]) -> None:
    plain, squash = (load_model(str(save_clip(mode, resize_mode=mode))) for mode in ("shortest", "squash"))
    padded = load_model(str(save_clip("padded", resize_mode="longest", fill_color=9)))
    assert len({plain.fingerprint, squash.fingerprint, padded.fingerprint}) == 3
    assert padded.framing == Framing(16, "bicubic", "longest", 9)
    from robustvlm.defenses import smooth
    from robustvlm.defenses.classifier import Refusing, ZeroShot
    from robustvlm.models import zero_shot

    head = ZeroShot(zero_shot(smooth(padded, 0.1, 2), ["a", "b"], ["{}"], cache=False))
    assert Refusing(head, 0.5).framing == head.framing == padded.framing


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resize_mode": "crop"}, "unknown resize_mode 'crop': known: 'longest'"),
        ({"interpolation": "lanczos"}, "unknown interpolation 'lanczos': known: 'bicubic'"),
        ({"crop_pct": 0.9}, "has 'crop_pct', which open_clip does not know"),
        ({"mode": "L"}, "asks for images of mode 'L': only RGB"),
        ({"mean": 0}, r"has mean 0: write \[0, 0, 0\]"),
        ({"mean": [0.5, 0.5]}, r"needs 3 numbers as mean, got \[0.5, 0.5\]"),
        ({"std": [0.5, 0, 0.5]}, "needs 3 numbers as std"),
        ({"resize_mode": "longest", "fill_color": 300}, "fill_color must be a grey level from 0 to 255, got 300"),
    ],
)
def test_what_open_clip_would_not_do_is_refused(
    settings: dict[str, Any], said: str, save_clip: Callable[..., Path]
) -> None:
    folder = save_clip()
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["preprocess_cfg"] |= settings
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        load_model(str(folder))


def test_a_difference_from_open_clip_is_seen_at_load(
    save_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_clip(resize_mode="squash"))
    monkeypatch.setattr("robustvlm.models.clip.to_pixels", lambda image, framing: to_pixels(image, framing.image_size))
    with pytest.raises(UserError, match=r"preprocessing of model .* \(squash, bicubic, 16 pixels\) gives other pixels"):
        load_model(folder)


def test_means_may_be_one_number_or_left_out() -> None:
    config = {"size": 8, "mean": None, "std": 0.25}
    framing, mean, std = preprocessing_of(config, "m")
    assert (framing.resize_mode, mean, std) == ("shortest", open_clip.OPENAI_DATASET_MEAN, (0.25, 0.25, 0.25))
