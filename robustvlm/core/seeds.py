"""What makes numbers repeat to the bit: random streams named by what they are for, sums in one order, exact kernels."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Independent random streams derived from names, so that a draw never depends on what else ran


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of `parts` (run seed, image id, attack, restart, ...).

    Different parts give independent streams; the same parts give the same stream on any machine.

    Example:
        >>> derive_seed(0, "img-1", "pgd", 0) == derive_seed(0, "img-1", "pgd", 0)
        True
        >>> derive_seed(0, "img-1", "pgd", 0) == derive_seed(0, "img-1", "pgd", 1)
        False
    """
    # The type is part of the text, so that 1 and "1" differ; the length prefix keeps ("ab", "c") and ("a", "bc") apart.
    text = "".join(f"{type(part).__name__}:{len(str(part))}:{part};" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Let what draws from the global streams draw from a seed, and leave the draws of everything else as they were.

    Example:
        >>> with own_draws(torch.device("cpu"), 5):
        ...     first = torch.rand(2)
        >>> torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(5)))
        True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed seeds GPUs too; where there is none it notes for later who asked, which takes milliseconds.
        torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)
        yield


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(*parts)`; draws are made on the CPU so that devices agree.

    Example:
        >>> torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))
        True
    """
    return torch.Generator().manual_seed(derive_seed(*parts))


# Sums that come out the same to the bit: always in one order, whatever batch, layout, thread or processor adds them.
#
# Libraries add up the same numbers in another order when a row stands alone in its batch, lies in memory channel by
# channel or pixel by pixel, or is shared by threads. Whatever is recorded, or decides where an attack goes next, is
# summed here instead, so that an interrupted run ends with the very numbers of a straight one.


def row_sums(values: Tensor) -> Tensor:
    """Return the sum of every row, [B, ...] -> [B]: halves are added element by element until one number is left.

    Only element-wise additions are made, in an order that follows from the shape of a row alone. The rounding error
    grows with the logarithm of a row's length.

    Example:
        >>> row_sums(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([ 6., 15.])
    """
    flat = values.flatten(1)
    if flat.shape[1] == 0:
        return flat.new_zeros(len(flat))
    while flat.shape[1] > 1:
        if flat.shape[1] % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        half = flat.shape[1] // 2
        flat = flat[:, :half] + flat[:, half:]
    return flat[:, 0]


def row_norms(values: Tensor) -> Tensor:
    """Return the Euclidean length of every row, [B, ...] -> [B], summed as by `row_sums`.

    Example:
        >>> row_norms(torch.tensor([[[3.0], [4.0]]]))
        tensor([5.])
    """
    return row_sums(values * values).sqrt()


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows [B, D] times a matrix's transpose [K, D] as [B, K], every row by a product of its own.

    A matrix product adds up in another order for two rows than for sixty-four.

    Example:
        >>> rows_times(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[11., 17.]])
    """
    matrix = matrix.contiguous()
    return torch.stack([torch.mv(matrix, row.contiguous()) for row in rows]) if len(rows) else rows @ matrix.T


# Kernels that compute float32 as float32


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
