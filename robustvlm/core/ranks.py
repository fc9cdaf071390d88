"""Which of how many processes this is, as `torchrun` says in the environment, and which device it runs on."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from robustvlm.core.files import first_line
from robustvlm.core.link import Link, Watch
from robustvlm.errors import UserError

if TYPE_CHECKING:
    import torch

_CONNECT_SECONDS = 300


@dataclass(frozen=True)
class Ranks:
    """One process among `size` equal ones; alone by default.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine, which is also the number of its GPU.
        link: connection to the others; None when alone.

    Example:
        >>> [index for index in range(7) if Ranks(rank=1, size=3).mine(index)]
        [1, 4]
        >>> Ranks().barrier()
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    link: Link | None = field(default=None, repr=False, compare=False)

    @property
    def leader(self) -> bool:
        """Whether this is the process that holds the lock, prints and writes the results."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Whether piece `index` of the work is this process's; every piece is exactly one process's."""
        return index % self.size == self.rank

    def barrier(self) -> None:
        """Wait until all processes are here; a UserError as soon as one of them has failed or is lost."""
        if self.link is not None:
            self.link.barrier()

    def check(self) -> None:
        """Raise a UserError if another process has failed or is lost; cheap enough for every batch."""
        if self.link is not None:
            self.link.check()

    def share(self, text: str | None) -> str:
        """Return on every process the text given by rank 0."""
        return self.link.share(text) if self.link is not None else text or ""

    def gathered(self, text: str) -> list[str]:
        """Return on every process what each of them gave, by rank, once all have."""
        return self.link.gathered(text) if self.link is not None else [text]

    def fail(self, message: str) -> bool:
        """Tell the others why this process fails; return whether it should tell the user (the first does)."""
        return self.link.fail(message) if self.link is not None else True


def current_ranks() -> Ranks:
    """Return this process's place among those that `torchrun` started; alone without `torchrun`.

    Processes that read different images, each `mine(i)`, together read every image once. The first call connects to
    the other processes.

    Raises:
        UserError: values in the environment that contradict each other, or no connection.

    Example:
        >>> current_ranks()
        Ranks(rank=0, size=1, local_rank=0)
    """
    place = read_environment(os.environ)
    return place if place.size == 1 else _connected(place, _address(os.environ), _prefix(os.environ))


def read_environment(environment: Mapping[str, str]) -> Ranks:
    """Return the place that WORLD_SIZE, RANK and LOCAL_RANK name, not connected.

    Example:
        >>> read_environment({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"})
        Ranks(rank=2, size=4, local_rank=0)
    """
    size = _number(environment, "WORLD_SIZE", default=1, least=1)
    if size == 1:
        return Ranks()
    rank = _number(environment, "RANK", default=None, least=0)
    if rank >= size:
        raise UserError(f"the environment says RANK={rank} of WORLD_SIZE={size}: ranks go from 0 to {size - 1}")
    return Ranks(rank, size, _number(environment, "LOCAL_RANK", default=rank, least=0))


def _number(environment: Mapping[str, str], name: str, *, default: int | None, least: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        if default is None:
            raise UserError(f"the environment sets WORLD_SIZE but not {name}: start the processes with torchrun")
        return default
    # isdecimal: int() would also accept "1_0" and signs.
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UserError(
            f"the environment says {name}='{text}', expected a whole number of at least {least}: "
            "start the processes with torchrun, or unset WORLD_SIZE to run alone"
        )
    return int(text)


def _address(environment: Mapping[str, str]) -> tuple[str, int, bool]:
    host = environment.get("MASTER_ADDR", "").strip()
    if not host:
        raise UserError("the environment sets WORLD_SIZE but not MASTER_ADDR: start the processes with torchrun")
    port = _number(environment, "MASTER_PORT", default=None, least=1)
    return host, port, environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prefix(environment: Mapping[str, str]) -> str:
    """Processes that torchrun starts again after a failure must not meet the keys of the earlier attempt."""
    return f"robustvlm/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@lru_cache(maxsize=1)
def _connected(place: Ranks, address: tuple[str, int, bool], prefix: str) -> Ranks:
    from torch import distributed

    host, port, kept_by_agent = address
    hosts_store = place.leader and not kept_by_agent
    try:
        store = distributed.TCPStore(
            host,
            port,
            is_master=hosts_store,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_CONNECT_SECONDS),
        )
        board = distributed.PrefixStore(prefix, store)
        watch = Watch(place.rank, place.size, host, board)
    # AttributeError: a torch built without torch.distributed; ValueError: the hub's word is not understood
    except (RuntimeError, AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"rank {place.rank} of {place.size} cannot reach the other processes at {host}:{port} ({first_line(error)})"
        ) from error
    link = Link(board, rank=place.rank, size=place.size, hosts_store=hosts_store, watch=watch)
    return Ranks(place.rank, place.size, place.local_rank, link)


# The device of a process


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device named, or for "auto" the best there is: cuda, else cpu.

    Raises UserError when there is no such device, or it has no 64-bit numbers, which decide what lies in a ball.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}': pass auto, cpu, cuda or cuda:0") from error
    require_float64(found)
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"the device '{device}' is not one that models run on: pass auto, cpu, cuda or cuda:0")
    if found.type == "cpu" and found.index:
        raise UserError(f"the device '{device}' is not there: cpu is one device, pass cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"the device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def require_float64(device: torch.device) -> None:
    """Refuse a device without 64-bit numbers.

    Example:
        >>> import torch
        >>> require_float64(torch.device("mps"))
        Traceback (most recent call last):
        robustvlm.errors.UserError: the device 'mps' has no 64-bit numbers, which decide results: pass cpu or cuda
    """
    if device.type == "mps":
        raise UserError("the device 'mps' has no 64-bit numbers, which decide results: pass cpu or cuda")


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """Make the GPU with this process's local rank its current one, so that "cuda" means another one for each process.

    Raises UserError when there are fewer GPUs than processes on this machine, or one of them is named for all.

    Example:
        >>> import torch
        >>> device_of_rank(torch.device("cpu"), Ranks(rank=1, size=2, local_rank=1))
        device(type='cpu')
    """
    if ranks.size == 1 or device.type != "cuda":
        return device
    if str(device) != "cuda":
        raise UserError(f"'{device}' would be the GPU of all {ranks.size} processes: pass --device cuda")
    import torch

    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {ranks.local_rank} of this machine has no GPU, torch sees {torch.cuda.device_count()}: start one "
            "process per GPU, numbered from 0 on each machine by LOCAL_RANK, or pass --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return device
