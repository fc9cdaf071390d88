"""Every backend's way to say that memory ran out is recognised, so that batches are halved; other failures are not."""

from __future__ import annotations

import pytest
import torch

from robustvlm.attacks import Job, LaneEngine, Oracle, ThreatModel, parse_attacks
from robustvlm.errors import is_out_of_memory

SAID = [
    "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 79.15 GiB total capacity)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.2 MB, max allowed: 18.1 GB)",
    "Invalid buffer size: 24.00 GiB",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    "[Errno 12] Cannot allocate memory",
    "could not create a primitive",
    "could not create a memory object",
    "std::bad_alloc",
]


@pytest.mark.parametrize("text", SAID)
def test_memory_that_ran_out_is_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


def test_so_are_its_own_exceptions_and_nothing_else() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("anything"))
    for other in ("mat1 and mat2 shapes cannot be multiplied", "CUDA error: device-side assert triggered", ""):
        assert not is_out_of_memory(RuntimeError(other))


@pytest.mark.parametrize("text", ["could not create a primitive", "std::bad_alloc"])
def test_lanes_are_halved_until_a_batch_fits(text: str) -> None:
    class Small(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 2:
                raise RuntimeError(text)
            return x.flatten(1)[:, :3]

    (attack,) = parse_attacks("pgd:steps=2")
    engine = LaneEngine(Oracle(Small()), attack, ThreatModel("Linf", 0.1), lanes=8, seed=0)
    jobs = [Job(str(i), i, torch.rand(3, 2, 2), label=0) for i in range(5)]
    assert len(list(engine.run(jobs))) == 5
    assert engine.rungs[0] == 2
