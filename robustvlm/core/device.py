"""Which device to run on, and how exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device named, or for "auto" the best there is: cuda, else mps, else cpu.

    Raises UserError when there is no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}': pass auto, cpu, cuda, cuda:0 or mps") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"the device '{device}' is not one that models run on: pass auto, cpu, cuda, cuda:0 or mps")
    if found.type != "cuda" and found.index:
        raise UserError(f"the device '{device}' is not there: {found.type} is one device, pass {found.type}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"the device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("the device 'mps' is not there: pass auto or cpu")
    return found


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """Make the GPU with this process's local rank its current one, so that "cuda" means another one for each process.

    Raises UserError when there are fewer GPUs than processes on this machine, or one of them is named for all.

    Example:
        >>> device_of_rank(torch.device("cpu"), Ranks(rank=1, size=2, local_rank=1))
        device(type='cpu')
    """
    if ranks.size == 1 or device.type != "cuda":
        return device
    if str(device) != "cuda":
        raise UserError(f"'{device}' would be the GPU of all {ranks.size} processes: pass --device cuda")
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {ranks.local_rank} of this machine has no GPU, torch sees {torch.cuda.device_count()}: "
            "start one process per GPU, or pass --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return device


@contextlib.contextmanager
def full_precision_kernels() -> Iterator[None]:
    """Run float32 as float32 (no TF32, no bfloat16 within) with reproducible cuDNN kernels; restore all settings.

    Example:
        >>> with full_precision_kernels():
        ...     torch.backends.cudnn.deterministic
        True
    """
    switches = _switches()
    try:
        for put, exact, _ in switches:
            put(exact)
        yield
    finally:
        for put, _, before in switches:
            put(before)


def _switches() -> list[tuple[Callable[[Any], None], object, object]]:
    """Return torch's settings of how exactly float32 is computed: how to set one, its exact value and the present one.

    Since torch 2.9 each backend has a precision of its own; where these were set, the older flags refuse to be read.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    found: list[tuple[Callable[[Any], None], object, object]] = []
    with contextlib.suppress(RuntimeError):
        found.append((torch.set_float32_matmul_precision, "highest", torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        found.append((partial(setattr, cudnn, "allow_tf32"), False, cudnn.allow_tf32))
    parts: list[Any] = [torch.backends.cuda.matmul]
    parts += [getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    parts += [getattr(cudnn, name, None) for name in ("conv", "rnn")]
    for part in parts:
        if hasattr(part, "fp32_precision"):
            found.append((partial(setattr, part, "fp32_precision"), "ieee", part.fp32_precision))
    found.append((partial(setattr, cudnn, "deterministic"), True, cudnn.deterministic))
    found.append((partial(setattr, cudnn, "benchmark"), False, cudnn.benchmark))
    return found
