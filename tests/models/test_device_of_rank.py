"""Every process of a job gets a GPU of its own, or one line on why it cannot; float32 is float32 on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustvlm.attacks.tensors import own_device
from robustvlm.commands.attack import AttackSettings
from robustvlm.commands.attack import work as attack_work
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.certify import work as certify_work
from robustvlm.commands.evaluate.work import evaluate_clean
from robustvlm.core.ranks import Ranks, device_of_rank, resolve_device
from robustvlm.core.seeds import _switches, full_precision_kernels
from robustvlm.data import open_data
from robustvlm.errors import UserError
from robustvlm.models.vlm import VLM
from robustvlm.models.zero_shot import ZeroShotClassifier, class_embeddings

CUDA = torch.device("cuda")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that there are two GPUs; return the list of those made current."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def test_the_local_rank_chooses_the_gpu_and_the_name_stays_that_of_all(chosen: list[int]) -> None:
    assert device_of_rank(CUDA, Ranks(rank=5, size=8, local_rank=1)) == CUDA
    assert chosen == [1]


def test_a_process_on_its_own_keeps_its_device(chosen: list[int]) -> None:
    assert device_of_rank(torch.device("cuda:1"), Ranks()) == torch.device("cuda:1")
    assert device_of_rank(torch.device("cpu"), Ranks(1, 2, 1)) == torch.device("cpu")
    assert chosen == []


def test_one_gpu_for_all_or_too_few_of_them_are_refused(chosen: list[int]) -> None:
    with pytest.raises(UserError, match="'cuda:0' would be the GPU of all 2 processes: pass --device cuda"):
        device_of_rank(torch.device("cuda:0"), Ranks(1, 2, 1))
    with pytest.raises(
        UserError, match="process 2 of this machine has no GPU, torch sees 2: start one process per GPU"
    ):
        device_of_rank(CUDA, Ranks(2, 3, 2))
    assert chosen == []


@pytest.mark.parametrize("what", ["attack", "certify", "certify from a cache"])
def test_every_command_of_several_processes_takes_the_gpu_of_its_rank(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU for all is what `device_of_rank` refuses, so whoever asks it says this."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module in (attack_work, certify_work):
        monkeypatch.setattr(module, "current_ranks", lambda: Ranks(1, 2, 1))
    source = SimpleNamespace(manifest={"config": {}}, config=SimpleNamespace(cache="float16", claim="feature"))
    monkeypatch.setattr(certify_work, "open_source", lambda *_, **__: source)
    for name in ("with_source", "_check"):
        monkeypatch.setattr(certify_work, name, lambda settings, _: settings)
    kept = "kept" if "cache" in what else None
    certifying = CertifySettings(model="tiny", device="cuda:0", sigma=0.1, from_cache=kept)
    attacking = AttackSettings(model="tiny", device="cuda:0")
    with pytest.raises(UserError, match="'cuda:0' would be the GPU of all 2 processes"):
        attack_work.open_work(attacking) if what == "attack" else certify_work.open_work(certifying)


def test_a_mac_s_gpu_is_refused_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("cpu")
    for name in ("mps", "mps:0"):
        with pytest.raises(UserError, match="the device 'mps' has no 64-bit numbers, which decide results: pass cpu"):
            resolve_device(name)

    class Apple(torch.nn.Linear):
        def parameters(self, *_: object) -> Iterator[Any]:
            return iter([SimpleNamespace(device=torch.device("mps"))])

    with pytest.raises(UserError, match="no 64-bit numbers"):
        own_device(Apple(2, 2), torch.rand(1, 3, 2, 2))


def _by_flag() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _by_backend() -> None:
    for part in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        if hasattr(part, "fp32_precision"):
            part.fp32_precision = "tf32" if part is torch.backends.cuda.matmul else "bf16"


def _for_all() -> None:
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "choose", [lambda: torch.set_float32_matmul_precision("medium"), _by_flag, _by_backend, _for_all]
)
def test_float32_is_exact_whatever_a_program_has_set_and_settings_stay(choose: Callable[[], None]) -> None:
    before = [(put, now) for put, _, now in _switches()]
    everywhere = getattr(torch.backends, "fp32_precision", None)
    try:
        choose()
        chosen = [now for *_, now in _switches()]
        with full_precision_kernels(), full_precision_kernels():
            assert all(now == exact for _, exact, now in _switches())
            assert torch.get_float32_matmul_precision() == "highest"
        assert [now for *_, now in _switches()] == chosen
    finally:
        if everywhere is not None:
            torch.backends.fp32_precision = everywhere
        for put, now in before:
            put(now)


class _Told(VLM):
    """Writes down how exactly it is asked to compute."""

    def __init__(self) -> None:
        super().__init__(spec="told", image_size=64, logit_scale=10.0)
        self.told: list[str] = []

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        self.told.append(torch.get_float32_matmul_precision())
        return pixels.mean((2, 3))

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        self.told.append(torch.get_float32_matmul_precision())
        return torch.tensor([[1.0, len(text), len(text) ** 2] for text in texts])


def test_prompts_and_clean_images_are_embedded_as_exactly_as_attacked_ones() -> None:
    source = open_data("emoji")
    before = torch.get_float32_matmul_precision()
    vlm = _Told()
    try:
        torch.set_float32_matmul_precision("high")
        class_embeddings(vlm, ["a", "bb"], ["{}"], cache=False)
        evaluate_clean(
            ZeroShotClassifier(vlm, source.class_names, torch.eye(len(source.class_names), 3)), source, limit=1
        )
    finally:
        torch.set_float32_matmul_precision(before)
    assert vlm.told == ["highest", "highest"]
