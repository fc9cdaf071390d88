"""What a user's code may change for the whole process, put back as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def same_process() -> Iterator[None]:
    """Put back what a user's code may change for the whole process: gradient mode, dtype, determinism, threads."""
    cudnn = torch.backends.cudnn
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    exact, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = (cudnn.deterministic, cudnn.benchmark)
    try:
        yield
    finally:
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) != (
            exact,
            warn,
        ):
            torch.use_deterministic_algorithms(exact, warn_only=warn)
        if (cudnn.deterministic, cudnn.benchmark) != flags:
            cudnn.deterministic, cudnn.benchmark = flags


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Put the random states of torch, NumPy and Python back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
