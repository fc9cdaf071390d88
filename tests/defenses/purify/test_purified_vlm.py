"""The purified encoder: who tells it the noise, what it is without noise, its identity, its way to disk and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from analytic_encoders import SIDE, Circle, image_at
from torch import Tensor, nn

from robustvlm.attacks.honesty import open_gradients
from robustvlm.defenses import load_classifier, load_pipeline, smooth
from robustvlm.defenses.purify import Parts, PurifiedVLM, load_denoiser
from robustvlm.defenses.purify.denoiser import OwnDenoiser
from robustvlm.defenses.purify.parts import Mapper, MapperShape, write_parts
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.errors import UserError
from robustvlm.models.saved import CARD_NAME, Card, write_card

OWN = """
import torch
from torch import nn

class Shrink(nn.Module):
    def __init__(self, by=1.0):
        super().__init__()
        self.register_buffer("by", torch.tensor(by))
    def forward(self, noisy, sigma):
        return noisy / (1 + self.by * sigma**2)

class Rounding(Shrink):
    differentiable = False
    def forward(self, noisy, sigma):
        return (noisy * 8).round() / 8

class Stubborn(Rounding):
    def surrogate(self, noisy, sigma):
        return noisy * (1 - sigma)

class Plain:
    differentiable = False
    def __call__(self, noisy, sigma):
        return noisy.detach() * 0.5

def wrong_shape(): return lambda noisy, sigma: noisy.mean(1)
def not_finite(): return lambda noisy, sigma: noisy * float("nan")
def one_argument(): return lambda noisy: noisy
def nothing(): return 7
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_denoisers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_denoisers", raising=False)


def denoiser(name: str = "Shrink") -> OwnDenoiser:
    return load_denoiser(f"own_denoisers:{name}", SIDE, torch.device("cpu"))


def parts(dim: int = 2, seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    made = Parts(Purifier(PurifierShape(widths=(8,), embedding=8)), Mapper(MapperShape(dim, embedding=8)), (0.25,))
    for part in (made.purifier, made.mapper):
        assert part is not None
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def features(vlm: PurifiedVLM, z: float = 0.7) -> Tensor:
    return vlm.encode_image(image_at(z))


def test_without_noise_it_is_the_encoder() -> None:
    vlm = parts().around(Circle())
    assert torch.allclose(features(vlm), Circle().encode_image(image_at(0.7)))
    assert torch.equal(vlm.encode_text(["30"]), Circle().encode_text(["30"]))
    assert (vlm.spec, vlm.image_size, vlm.logit_scale) == (Circle().spec, SIDE, 10.0)


def test_behind_noise_it_is_purifier_encoder_mapper() -> None:
    made = parts()
    assert isinstance(made.purifier, Purifier)
    assert made.mapper is not None
    x, unit = image_at(0.7), nn.functional.normalize
    wanted = unit(made.mapper(Circle().encode_image(made.purifier(x, 0.3)), 0.3), dim=1)
    assert torch.allclose(features(made.around(Circle()).at_noise(0.3)), wanted)
    assert not torch.allclose(features(made.around(Circle()).at_noise(0.6)), wanted, atol=1e-3)


def test_smoothing_tells_it_the_noise() -> None:
    told = []

    def watch(noisy: Tensor, sigma: float) -> Tensor:
        told.append((sigma, noisy.std().item()))
        return noisy

    vlm = PurifiedVLM(Circle(), OwnDenoiser(watch, spec="watch"), None)
    smooth(vlm, 0.25, 200).encode_image(image_at(0.0))
    assert {sigma for sigma, _ in told} == {0.25}
    assert told[0][1] == pytest.approx(0.25, rel=0.05)  # it stands behind the noise


def test_an_encoder_behind_a_purifier_is_not_told_the_noise_again() -> None:
    inner = PurifiedVLM(Circle(), denoiser(), None)
    only_mapper = PurifiedVLM(inner, None, parts().mapper).at_noise(0.5)
    assert isinstance(only_mapper.base, PurifiedVLM)
    assert only_mapper.base.sigma == 0.5
    twice = PurifiedVLM(inner, denoiser(), None).at_noise(0.5)
    assert isinstance(twice.base, PurifiedVLM)
    assert twice.base.sigma == 0.0
    assert torch.allclose(twice.encode_image(image_at(0.7)), inner.at_noise(0.5).encode_image(image_at(0.7)))


def test_identity_covers_encoder_parts_and_noise() -> None:
    made = parts()
    vlms = [
        Circle(),
        made.around(Circle()),
        made.around(Circle(2.0)),
        made.around(Circle()).at_noise(0.25),
        made.around(Circle()).at_noise(0.5),
        Parts(made.purifier, None, ()).around(Circle()),
        Parts(None, made.mapper, ()).around(Circle()),
        Parts(denoiser(), None, ()).around(Circle()),
        parts(seed=1).around(Circle()),
    ]
    digests = [vlm.fingerprint for vlm in vlms]
    assert len(set(digests)) == len(digests)
    assert parts().around(Circle()).fingerprint == digests[1]
    own = Parts(denoiser(), None, ()).around(Circle())
    assert own.fingerprint == digests[7]
    own.purifier.denoiser.by += 1  # type: ignore[union-attr]
    assert own.fingerprint != digests[7]


def saved(folder: Path, made: Parts, base: str = "tiny") -> str:
    folder.mkdir()
    write_parts(folder, made)
    card = Card("purify", base=base, base_fingerprint=load_pipeline(base).fingerprint, settings=made.settings())
    write_card(folder, card)
    return str(folder)


def test_to_disk_and_back(tmp_path: Path) -> None:
    made = parts(dim=load_pipeline("tiny").encode_text(["a"]).shape[1])
    spec = saved(tmp_path / "run", made)
    vlm, pixels = load_pipeline(spec), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert isinstance(vlm, PurifiedVLM)
    assert vlm.spec == spec
    assert vlm.fingerprint == made.around(load_pipeline("tiny")).fingerprint
    wanted = made.around(load_pipeline("tiny")).at_noise(0.25).encode_image(pixels)
    assert torch.equal(vlm.at_noise(0.25).encode_image(pixels), wanted)
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    smoothed = load_classifier(f"{spec}+smooth:0.25:4", ["apple", "dog"], ["{}"], cache=False)
    assert smoothed.vlm is not None
    assert smoothed.vlm.base.sigma == 0.25  # type: ignore[union-attr]
    assert smoothed.vlm.spec == f"{spec}+smooth:0.25:4"


def test_a_denoiser_of_the_user_is_named_in_the_card(tmp_path: Path) -> None:
    spec = saved(tmp_path / "run", Parts(denoiser(), None, (0.25,)))
    vlm = load_pipeline(spec).at_noise(1.0)
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.allclose(vlm.encode_image(pixels), load_pipeline("tiny").encode_image(pixels / 2))
    source = tmp_path / "own_denoisers.py"
    source.write_text(source.read_text() + "# changed\n")
    with pytest.raises(UserError, match="is no longer the one"):
        load_pipeline(spec)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "mapper.safetensors").unlink(), "no checkpoint file"),
        (lambda run: (run / "mapper.safetensors").write_bytes(b"no"), "damaged"),
        (lambda run: (run / "purifier.safetensors").replace(run / "mapper.safetensors"), "no checkpoint|does not fit"),
        (lambda run: write_card(run, Card("purify", base="tiny", settings={"mapper": {"dim": "x"}})), "no mapper"),
        (lambda run: write_card(run, Card("purify", base="tiny", settings={"mapper": {"dim": 9}})), "does not fit"),
        (lambda run: write_card(run, Card("purify", base="tiny", settings={"mapper": {"size": 9}})), "no mapper"),
    ],
)
def test_damaged_folders_are_explained_in_one_line(tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    spec = saved(tmp_path / "run", parts(dim=load_pipeline("tiny").encode_text(["a"]).shape[1]))
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=words) as caught:
        load_pipeline(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("settings", "sigma"), 0.25, r"must list noise levels, as \[0.25\], got 0.25"),
        (("settings", "sigma"), ["x"], "must list noise levels"),
        (("settings", "denoiser"), "x:y", "describes no denoiser"),
        (("settings", "denoiser"), {"spec": 3}, "module:callable"),
        (("settings", "purifier"), [1], "describes no purifier"),
        (("settings", "purifier", "widths"), [], "widths must be whole numbers above 0"),
        (("settings", "purifier", "widths"), 8, "widths must be whole numbers above 0"),
        (("settings", "purifier", "widths"), ["a"], "widths must be whole numbers above 0"),
        (("settings", "purifier", "stride"), 0, "stride must be a whole number above 0"),
        (("settings", "purifier", "blocks"), True, "blocks must be a whole number above 0"),
        (("settings", "mapper"), "x", "describes no mapper"),
        (("settings", "mapper", "hidden"), float("inf"), "hidden must be a positive number"),
        (("settings", "mapper", "hidden"), float("nan"), "hidden must be a positive number"),
        (("settings", "mapper", "dim"), 10**30, "dim must be a whole number"),
        (("base", "relative"), 3, "base relative must be text, got 3"),
        (("base", "operators"), ["+"], "base operators must be text"),
        (("base", "fingerprint"), 3, "base fingerprint must be text"),
        (("base",), 3, "not the card of a model"),
        (("base",), ["tiny"], "not the card of a model"),
    ],
)
def test_damaged_cards_are_explained_in_one_line(
    tmp_path: Path, where: tuple[str, ...], value: object, words: str
) -> None:
    spec = saved(tmp_path / "run", parts(dim=load_pipeline("tiny").encode_text(["a"]).shape[1]))
    card = tmp_path / "run" / CARD_NAME
    content = json.loads(card.read_text())
    place = content
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    card.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_pipeline(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", r"must return pixels \[2, 3, 4, 4\], got \[2, 4, 4\]"),
        ("not_finite", "NaN"),
        ("one_argument", "it raised TypeError"),
        ("nothing", "int cannot"),
        ("missing", "has no 'missing'"),
    ],
)
def test_a_denoiser_that_does_not_fit_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        denoiser(name)
    with pytest.raises(UserError, match="is named module:callable"):
        load_denoiser("blur", SIDE, torch.device("cpu"))


@pytest.mark.parametrize(("name", "slope"), [("Rounding", 1.0), ("Stubborn", 0.75), ("Plain", 1.0)])
def test_attacks_go_straight_through_a_denoiser_without_gradient(name: str, slope: float) -> None:
    vlm = PurifiedVLM(Circle(), denoiser(name), None).at_noise(0.25)
    assert len(open_gradients(vlm)) >= 1
    x = image_at(0.7).requires_grad_()
    features = vlm.encode_image(x)
    turned = vlm.purifier(x.detach(), 0.25).flatten().sum() / x.numel() ** 0.5  # type: ignore[misc]
    assert torch.allclose(features[0, 0], turned.cos())
    features[0, 0].backward()
    assert x.grad is not None
    assert x.grad.sum().item() / x.numel() ** 0.5 == pytest.approx(-slope * turned.sin().item(), rel=1e-4)
