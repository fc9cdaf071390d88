"""What the ranks of a training exchange, and what it costs: encoder passes and memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from robustvlm.core.ranks import Ranks

# What the ranks of a training job exchange: gradients by DDP, features of a batch, counts of a validation


def gathered(rows: Tensor) -> Tensor:
    """Return the rows [B, ...] of all ranks [ranks * B, ...], in order of rank; `rows` itself on a single rank.

    Differentiable: a loss that every rank computes from all rows gives, after DDP's averaging, the gradient that one
    rank would have computed. Every rank must give as many rows.

    Example:
        >>> gathered(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not _several():
        return rows
    found: Tensor = _Gather.apply(rows)
    return found


def summed(counts: Tensor) -> Tensor:
    """Return the elementwise sum over all ranks; `counts` itself on a single rank."""
    if not _several():
        return counts
    total = counts.clone()
    distributed.all_reduce(total)
    return total


def rank_and_size() -> tuple[int, int]:
    """Return which rank of how many this process is in the present process group; (0, 1) without one."""
    return (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """All-gather whose gradient is the sum over ranks of what they have to say about the rows of this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        distributed.all_reduce(total)
        return total.narrow(0, distributed.get_rank() * ctx.count, ctx.count)


class process_group:
    """Hold torch's process group while the ranks of a job train: NCCL for GPUs, Gloo otherwise; nothing when alone.

    Where the exchange breaks off because another process died, failed or ended, that is what is raised.
    """

    _made = 0

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self._mine = False

    def __enter__(self) -> None:
        if self.ranks.link is None or distributed.is_initialized():
            return
        # A job may train more than once, and the addresses of an earlier group still stand in its part of the store.
        process_group._made += 1
        try:
            distributed.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=self.ranks.link.store_for(f"training {process_group._made}"),
                rank=self.ranks.rank,
                world_size=self.ranks.size,
            )
        except RuntimeError:
            self.ranks.link.blame()
            raise
        self._mine = True

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self.ranks.link is not None and isinstance(error, RuntimeError):
                self.ranks.link.blame()
        finally:
            if self._mine:
                distributed.destroy_process_group()


# Counting encoder passes where they happen


class Passes:
    """How many images went through a module, forward and backward."""

    forward = 0
    backward = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@contextmanager
def counted(module: nn.Module) -> Iterator[Passes]:
    """Count the rows that pass through `module` inside the block; a backward pass counts when its output gets there.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> with counted(layer) as passes:
        ...     layer(torch.ones(3, 2)).sum().backward()
        >>> passes.forward, passes.backward
        (3, 3)
    """
    passes = Passes()

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if not isinstance(output, Tensor):
            return
        passes.forward += len(output)
        if output.requires_grad:
            output.register_hook(came_back)

    def came_back(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    handle = module.register_forward_hook(seen)
    try:
        yield passes
    finally:
        handle.remove()


# How much memory a training held at most


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the process on the CPU; 0 where nobody can tell.

    Example:
        >>> peak_memory(torch.device("cpu")) >= 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
