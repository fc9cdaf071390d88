"""The host beside a device: what it sends without waiting, fetches in one wait, and times without one.

A GPU works through what it was given while the host prepares the next thing. Every number that the host reads makes it
wait until the GPU has caught up, and so does every copy that does not say otherwise; the GPU then stands still until it
is told something new. On the CPU all of this costs nothing, and nothing here changes a number.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, without waiting for a GPU that is to receive it.

    Example:
        >>> sent(torch.tensor([1, 2]), torch.device("cpu"), torch.float32)
        tensor([1., 2.])
    """
    # CUDA takes a copy of pageable memory before the call returns, so the source may be changed or freed at once.
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type == "cuda" and tensor.device.type == "cpu")


def fetched(columns: Sequence[Tensor]) -> list[list[float]]:
    """Return columns [B] of numbers or truths as lists, fetched in one wait; float64 holds all but huge integers.

    Example:
        >>> fetched([torch.tensor([0.5, 2.0]), torch.tensor([True, False])])
        [[0.5, 2.0], [1.0, 0.0]]
    """
    found: list[list[float]] = torch.stack([column.double() for column in columns]).tolist()
    return found


class Arriving:
    """A tensor on its way to the host, behind what the device has to do by now and ahead of what it is given later.

    Example:
        >>> Arriving(torch.ones(2)).wait()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        gpu = tensor.device.type == "cuda"
        self._here = tensor.to("cpu", non_blocking=gpu)
        if gpu:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Return the tensor once it is here."""
        if self._event is not None:
            self._event.synchronize()
        return self._here


class Stopwatch:
    """Seconds that a device spends in blocks, without making the host wait for the end of any.

    On a GPU, from the moment at which it comes to the block to that at which the block's last kernel ends, by its own
    clock; idle moments inside, when the host is slower, are part of it. Elsewhere it is the time of the host. Blocks do
    not overlap, so the sum is at most the time that passed. Reading `seconds` waits for the blocks that are under way.

    Example:
        >>> watch = Stopwatch()
        >>> watch.start(torch.device("cpu"))
        >>> watch.stop(torch.device("cpu"))
        >>> 0 < watch.seconds < 1
        True
    """

    def __init__(self) -> None:
        self._past = 0.0
        self._began: Any = None
        self._under_way: deque[tuple[Any, Any]] = deque()

    def start(self, device: torch.device) -> None:
        """Begin a block whose work goes to a device."""
        self._began = _mark(device) if device.type == "cuda" else time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End the block."""
        if device.type == "cuda":
            self._under_way.append((self._began, _mark(device)))
            while self._under_way and self._under_way[0][1].query():
                self._count()
        else:
            self._past += time.perf_counter() - self._began

    def add(self, seconds: float) -> None:
        """Count seconds that were taken in another way."""
        self._past += seconds

    @property
    def seconds(self) -> float:
        """The seconds of all blocks that have ended."""
        while self._under_way:
            self._under_way[0][1].synchronize()
            self._count()
        return self._past

    def _count(self) -> None:
        start, end = self._under_way.popleft()
        self._past += start.elapsed_time(end) / 1000


def _mark(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
