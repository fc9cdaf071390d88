"""Streams named by their parts: equal names, equal draws; anything else, independent draws."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.core.seeds import derive_seed, generator

# Names from file systems may hold bytes that are no text; Python carries them as lone surrogates.
names = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
)
parts = st.lists(st.one_of(names, st.integers()), min_size=1, max_size=4)


@given(parts, parts)
def test_seeds_are_equal_exactly_for_equal_parts(a, b):
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (derive_seed(*a) == derive_seed(*b)) == same


@given(parts)
def test_seeds_fit_every_generator(a):
    assert 0 <= derive_seed(*a) < 2**63
    torch.rand(1, generator=generator(*a))


def test_neighbouring_streams_are_uncorrelated():
    draws = torch.stack([torch.randn(2000, generator=generator(0, f"image-{i}", "pgd", 0)) for i in range(40)])
    correlation = torch.corrcoef(draws) - torch.eye(40)
    assert correlation.abs().max() < 0.12  # 5 standard errors
