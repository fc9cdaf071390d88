"""Independent random streams derived from names, so that a draw never depends on what else ran."""

from __future__ import annotations

import hashlib

import torch


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


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(*parts)`; draws are made on the CPU so that devices agree.

    Example:
        >>> torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))
        True
    """
    return torch.Generator().manual_seed(derive_seed(*parts))
