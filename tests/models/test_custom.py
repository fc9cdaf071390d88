"""The user's own encoder: found from the current folder, held to the protocol, wrapped like any model."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from robustvlm.attacks import Oracle
from robustvlm.attacks.honesty import open_gradients
from robustvlm.attacks.objectives import objective
from robustvlm.attacks.probe import probe
from robustvlm.certify.threats import read_noise
from robustvlm.commands.certify.encoder import NoisyEncoder, probe_encoder
from robustvlm.errors import UserError
from robustvlm.models import load_model

GOOD = """
import torch

class Encoder(torch.nn.Module):
    image_size = 8
    logit_scale = 20.0
    bias = 0.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Linear(3 * 64, 5)
        self.text = torch.nn.Embedding(256, 5)

    def encode_image(self, pixels):
        return 7 * self.image(pixels.flatten(1)) + self.bias

    def encode_text(self, texts):
        return torch.stack([self.text(torch.tensor(list(text.encode()))).mean(0) for text in texts])
"""
PLAIN = """
import torch

class Encoder:
    image_size = 8
    logit_scale = torch.tensor(20.0)

    def __init__(self):
        self.weight = torch.full((3 * 64, 5), SCALE)

    def encode_image(self, pixels):
        return pixels.flatten(1) @ self.weight

    def encode_text(self, texts):
        return torch.tensor([[float(len(text))] * 5 for text in texts])
"""
_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Write a module to the current folder and return its name; each a new one, for Python caches modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = set(sys.modules)

    def save(source: str) -> str:
        name = f"user_encoder_{next(_numbers)}"
        Path(f"{name}.py").write_text(source)
        return name

    yield save
    for name in set(sys.modules) - before:
        if name.startswith("user_encoder_"):
            del sys.modules[name]


def refused(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_module_is_wrapped_frozen_and_scaled_to_unit_norm(write: Callable[..., str]) -> None:
    vlm = load_model(f"{write(GOOD)}:Encoder")
    pixels = torch.rand(2, 3, 16, 16).requires_grad_()
    features = vlm.encode_image(pixels)
    assert torch.allclose(features.norm(dim=-1), torch.ones(2), atol=1e-6)
    assert torch.autograd.grad(features[0, 0], pixels)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in vlm.parameters())
    assert (vlm.image_size, vlm.logit_scale, vlm.interpolation) == (8, 20.0, "bicubic")
    assert vlm.encode_text(["ab", "c"]).shape == (2, 5)


def test_a_plain_object_and_a_factory_function(write: Callable[..., str]) -> None:
    name = write(PLAIN.replace("SCALE", "0.5") + "\ndef make():\n    return Encoder()\n")
    assert load_model(f"{name}:make").encode_image(torch.rand(1, 3, 8, 8)).shape == (1, 5)


def test_fingerprint_follows_weights_and_source(write: Callable[..., str]) -> None:
    name = write(GOOD)
    digest = load_model(f"{name}:Encoder").fingerprint
    assert load_model(f"{name}:Encoder").fingerprint == digest
    Path(f"{name}.py").write_text(GOOD.replace("bias = 0.0", "bias = 1.0"))
    assert load_model(f"{name}:Encoder").fingerprint != digest
    plain = write(PLAIN.replace("SCALE", "float(open('scale.txt').read())"))
    digests = []
    for scale in ("0.5", "0.25"):
        Path("scale.txt").write_text(scale)
        digests.append(load_model(f"{plain}:Encoder").fingerprint)
    assert digests[0] != digests[1]


def test_names_that_are_not_there(write: Callable[..., str]) -> None:
    name = write(GOOD)
    assert "no module 'nowhere'" in refused("nowhere:Encoder")
    assert "did you mean 'Encoder'" in refused(f"{name}:Encodr")
    assert "is a float, not a callable" in refused(f"{name}:Encoder.logit_scale")
    broken = write("import not_installed_anywhere\n")
    assert "needs 'not_installed_anywhere', which is not installed" in refused(f"{broken}:Encoder")
    assert "SyntaxError" in refused(f"{write('def')}:Encoder")
    failing = write("def make():\n    raise RuntimeError('no weights here' + chr(10) + 'and more')\n")
    assert refused(f"{failing}:make").endswith("failed: RuntimeError: no weights here and more")
    needing = write("def attack(model, x, *rest, eps=1, **more):\n    return x\n")
    assert "called without arguments and is to return the encoder, but it needs model, x as" in refused(
        f"{needing}:attack"
    )
    assert "name what makes the model in it, as 'my_model:load'" in refused("code/my_model.py")
    assert "'timm:resnet50.a1_in1k'" in refused("resnet50.a1_in1k")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("image_size = 8", "size = 8", "no image_size"),
        ("logit_scale = 20.0", "scale = 20.0", "no logit_scale"),
        ("def encode_text", "def embed_text", "no encode_text"),
        ("image_size = 8", "image_size = (8, 8, 3)", "image_size must be a whole number of pixels, or (height, width)"),
        ("image_size = 8", "image_size = 0", "image_size must be at least 1 pixel"),
        ("logit_scale = 20.0", "logit_scale = -1", "logit_scale must be a positive number"),
        ("logit_scale = 20.0", "logit_scale = float('nan')", "logit_scale must be a positive number"),
        ("image_size = 8", "image_size = 8; interpolation = 'area'", "unknown interpolation 'area'"),
        ("image_size = 8", "image_size = 9", "it raised RuntimeError"),
        ("+ self.bias", "+ float('inf')", "encode_image of pixels [2, 3, 8, 8] must return finite features"),
        ("+ self.bias", "* 0", "a row of zeros"),
        ("(pixels.flatten(1)) + self.bias", "(pixels.flatten(1)).sum()", "got torch.float32 []"),
        (".mean(0) for text in texts])", ".mean(0) for text in texts][:1])", "got torch.float32 [1, 5]"),
        (".mean(0) for text in texts])", ".mean(0)[:4] for text in texts])", "must share one space"),
        ("return torch.stack(", "return list(", "got a list"),
    ],
)
def test_breaches_of_the_protocol_are_named(write: Callable[..., str], old: str, new: str, says: str) -> None:
    assert old in GOOD
    spec = f"{write(GOOD.replace(old, new))}:Encoder"
    message = refused(spec)
    assert says in message
    assert spec in message


def test_the_documented_example_works(write: Callable[..., str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    source = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def encode_image" in code)
    vlm = load_model(f"{write(source)}:encoder")
    pixels = torch.rand(2, 3, vlm.image_size, vlm.image_size).requires_grad_()
    (gradient,) = torch.autograd.grad(vlm.encode_image(pixels).sum(), pixels)
    assert gradient.abs().sum() > 0
    assert vlm.encode_text(["a photo of a cat"]).shape[1] == vlm.encode_image(pixels).shape[1]


KINDS = """
Good = Encoder

class InPlace(Good):
    def encode_image(self, pixels):
        return super().encode_image(pixels.sub_(0.5).div_(0.25))

class OutOfPlace(Good):
    def encode_image(self, pixels):
        return super().encode_image((pixels - 0.5) / 0.25)

class Blind(Good):
    @torch.inference_mode()
    def encode_image(self, pixels):
        return super().encode_image(pixels)

class Declared(Blind):
    differentiable = False
    def surrogate(self, pixels):
        return Good.encode_image(self, pixels)

class Half(Good):
    def __init__(self):
        super().__init__()
        self.image.bfloat16()
    def encode_image(self, pixels):
        return self.image(pixels.bfloat16().flatten(1))

class Squashed(Good):
    resize_mode = "squash"
"""


@pytest.fixture
def kinds(write: Callable[..., str]) -> Callable[[str], Oracle]:
    module = write(GOOD + KINDS)

    def oracle(name: str) -> Oracle:
        vlm = load_model(f"{module}:{name}")
        open_gradients(vlm)
        return Oracle(vlm)

    return oracle


def _gradient(oracle: Oracle) -> torch.Tensor:
    labels = torch.zeros(4, dtype=torch.int64)
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return oracle.gradient(pixels, objective("ce"), labels, labels)[2]


def test_an_encoder_that_normalises_in_place_is_one_that_does_not(kinds: Callable[[str], Oracle]) -> None:
    pixels = torch.rand(4, 3, 8, 8)
    before = pixels.clone()
    first, second = kinds("InPlace"), kinds("OutOfPlace")
    assert torch.equal(first.confirm(pixels), second.confirm(pixels))
    assert torch.equal(pixels, before)
    assert torch.equal(_gradient(first), _gradient(second))
    assert not probe(first, pixels, torch.zeros(4, dtype=torch.int64)).random
    assert (
        probe_encoder(NoisyEncoder(first.model), pixels, read_noise("0.1"), 4, model="own").checks == ()
    )  # and not "random"


def test_an_encoder_without_a_gradient_says_so_or_brings_another(kinds: Callable[[str], Oracle]) -> None:
    with pytest.raises(UserError, match=r"encode_image of '.*:Blind' has no gradient, which gradient attacks need"):
        _gradient(kinds("Blind"))
    torch.testing.assert_close(_gradient(kinds("Declared")), _gradient(kinds("Good")))


def test_half_precision_is_kept_and_widened(kinds: Callable[[str], Oracle]) -> None:
    oracle = kinds("Half")
    assert oracle.model.encoder.image.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert oracle.model.in_half
    assert oracle.confirm(torch.rand(2, 3, 8, 8)).dtype == torch.float32
    assert _gradient(oracle).abs().flatten(1).amax(1).min() > 0


def test_how_images_are_brought_to_it_is_the_encoders_to_say(kinds: Callable[[str], Oracle]) -> None:
    assert kinds("Squashed").model.framing.resize_mode == "squash"


def test_a_text_encoder_that_ends_the_program_has_failed(write: Callable[..., str]) -> None:
    leaving = GOOD.replace(
        "    def encode_text(self, texts):", "    def encode_text(self, texts):\n        texts[2:] and exit(0)"
    )
    vlm = load_model(f"{write(leaving)}:Encoder")
    with pytest.raises(UserError, match=r"encode_text of 'user_encoder_.*' ended the program"):
        vlm.encode_text(["a", "b", "c"])
