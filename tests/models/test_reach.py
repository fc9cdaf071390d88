"""What a user's denoiser is: everything that decides its answer counts, wherever it is kept, and nothing else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from robustvlm.defenses.purify import load_denoiser
from robustvlm.defenses.purify.denoiser import OwnDenoiser

# Each factory hides a network with dropout, or a setting, in another place.
OWN = """
import argparse
import functools
import logging
import torch
from torch import nn
from robustvlm.defenses.purify import OneStepDenoiser

WEIGHT, STRENGTH, ALPHAS, PREDICTION = 1.0, 0.5, torch.linspace(0.999, 0.01, 1000), "epsilon"

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.tensor(WEIGHT)), nn.Dropout(0.5)
    def forward(self, x, time=None):
        return 0.1 * self.drop(self.scale * x)

def closure():
    net = Net()
    return lambda noisy, sigma: net(noisy)

def default():
    return lambda noisy, sigma, net=Net(): net(noisy)

def partial():
    return functools.partial(lambda net, noisy, sigma: net(noisy), Net())

GLOBAL = Net()
def through_global(noisy, sigma):
    return GLOBAL(noisy)
def in_a_global():
    return through_global

class Holder:
    def __init__(self):
        self.nets = [{"one": Net()}]
    def __call__(self, noisy, sigma):
        return self.nets[0]["one"](noisy)
def in_an_object():
    return Holder()
def bound_method():
    return Holder().__call__

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = (Net(),)
    def forward(self, noisy, sigma):
        return self.nets[0](noisy)

def diffusion():
    return OneStepDenoiser(Net(), ALPHAS, prediction=PREDICTION)

def hidden_diffusion():
    net = Net()
    return OneStepDenoiser(lambda x, time: net(x), ALPHAS, prediction=PREDICTION)

def strength():
    by = STRENGTH
    return lambda noisy, sigma: by * noisy

def matrix():
    by = torch.tensor(STRENGTH)
    return lambda noisy, sigma: by * noisy

HOLDER = Holder()
def object_in_a_global():
    return lambda noisy, sigma: HOLDER(noisy, sigma)

class Logging:
    def __init__(self):
        self.log = logging.getLogger("reached")
    def __call__(self, noisy, sigma):
        return noisy
def library_object():
    holder = argparse.Namespace(net=Net())
    return lambda noisy, sigma: holder.net(noisy)

class Counting:
    calls = 0
    def __call__(self, noisy, sigma):
        self.calls += 1
        self.kept = noisy
        return noisy
"""
HIDING = [
    "closure",
    "default",
    "partial",
    "in_a_global",
    "in_an_object",
    "bound_method",
    "Listed",
    "hidden_diffusion",
    "library_object",
]
SIDE = 4


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OwnDenoiser]:
    """Load a denoiser as another process would, after an edit of its source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(name: str, **constants: str) -> OwnDenoiser:
        # The constants are set from outside, as an environment variable or a file would: the source stays the same.
        (tmp_path / "reached_denoisers.py").write_text(OWN)
        sys.modules.pop("reached_denoisers", None)
        module = __import__("reached_denoisers")
        for key, value in constants.items():
            setattr(module, key, value)
        if "WEIGHT" in constants:
            module.GLOBAL, module.HOLDER = module.Net(), module.Holder()
        return load_denoiser(f"reached_denoisers:{name}", SIDE, torch.device("cpu"))

    return make


@pytest.mark.parametrize("name", [*HIDING, "diffusion"])
def test_hidden_networks_count_and_are_frozen_and_in_evaluation_mode(
    load: Callable[..., OwnDenoiser], name: str
) -> None:
    own = load(name)
    assert own.fingerprint == load(name).fingerprint
    assert own.fingerprint != load(name, WEIGHT=2.0).fingerprint
    nets = [module for module in own.modules() if type(module).__name__ == "Net"]
    assert len(nets) == 1
    assert not any(module.training for module in own.modules())
    assert not any(parameter.requires_grad for parameter in own.parameters())
    pixels = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(own(pixels, 0.25), own(pixels, 0.25))
    assert own.double()(pixels.double(), 0.25).dtype == torch.float64
    assert nets[0].scale.dtype == torch.float64  # it goes where the denoiser goes


@pytest.mark.parametrize("name", ["diffusion", "hidden_diffusion"])
@pytest.mark.parametrize("other", [{"PREDICTION": "v"}, {"ALPHAS": torch.linspace(0.999, 0.02, 1000)}])
def test_schedule_and_prediction_count(load: Callable[..., OwnDenoiser], name: str, other: dict[str, object]) -> None:
    assert load(name).fingerprint != load(name, **other).fingerprint


@pytest.mark.parametrize("name", ["strength", "matrix"])
def test_values_in_closures_count(load: Callable[..., OwnDenoiser], name: str) -> None:
    assert load(name).fingerprint == load(name).fingerprint
    assert load(name).fingerprint != load(name, STRENGTH=0.75).fingerprint


def test_the_source_of_the_factory_counts_though_the_class_is_not_the_users(
    load: Callable[..., OwnDenoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load("diffusion").fingerprint
    monkeypatch.setitem(globals(), "OWN", OWN + "# changed\n")
    assert load("diffusion").fingerprint != before


def test_what_calls_leave_behind_does_not_count(load: Callable[..., OwnDenoiser]) -> None:
    own = load("Counting")
    before = own.fingerprint
    own(torch.rand(2, 3, SIDE, SIDE), 0.25)
    assert own.fingerprint == before == load("Counting").fingerprint


def test_objects_of_libraries_do_not_count_beyond_weights(load: Callable[..., OwnDenoiser]) -> None:
    before = load("Logging").fingerprint
    logging.getLogger("reached.another").setLevel(logging.ERROR)
    assert load("Logging").fingerprint == before


def test_objects_that_hold_each_other_end() -> None:
    ring: list[object] = [nn.Identity()]
    ring.append(ring)
    assert len(OwnDenoiser(lambda noisy, _: (ring, noisy)[1], spec="ring").hidden) == 1
