"""The sampling engine: the same samples whatever the batches, in order, fresh, and no more of them than it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from robustvlm.certify import (
    Certifier,
    ClassAtRadius,
    ClassRadius,
    FeatureRadius,
    FeatureTest,
    Finding,
    Job,
    OpensetRadius,
    Sampled,
    SamplingEngine,
    VocabularyRadius,
    VoteAtRadius,
    VoteRadius,
)
from robustvlm.certify.certifier import Stage
from robustvlm.certify.noise import CHUNK, noise_chunk, stream_seed
from robustvlm.certify.openset import contrast_vectors
from robustvlm.errors import UserError

SIGMA = 0.25
TEXT = np.eye(4)


def encode(noisy: Tensor) -> Tensor:
    """Unit features that depend on one row only, to the bit."""
    rows = noisy.flatten(1).double()
    raw = torch.stack([rows[:, i::4].sum(dim=1) + 0.3 * (i == 0) for i in range(4)], dim=1)
    return raw / raw.norm(dim=1, keepdim=True)


def jobs(count: int) -> list[Job]:
    draws = torch.Generator().manual_seed(3)
    return [Job(f"image-{i}", i, torch.rand(3, 2, 2, generator=draws), i % 4) for i in range(count)]


@pytest.mark.parametrize("early", [range(3), range(1, 7, 2), range(7)])
def test_an_image_whose_claim_is_out_of_reach_needs_no_sample_and_keeps_none_waiting(early: range) -> None:
    """No norm certifies a radius of so many sigma."""
    engine = SamplingEngine(encode, lanes=4, rungs=(4,), seed=1)
    found = engine.run(
        jobs(7),
        lambda job: FeatureTest(radius=12.0 if job.index in early else 0.03, cos0=0.5, sigma=SIGMA, alpha=0.01, n=40),
    )
    counts = {one.job.index: one.finding.n for one in found}
    assert sorted(counts) == list(range(7))
    assert all((counts[i] == 0) == (i in early) for i in range(7))


CLAIMS: dict[str, Callable[[], Certifier]] = {
    "feature": lambda: FeatureRadius(cos0=0.5, sigma=SIGMA, alpha=0.01, n=300, n_pilot=100),
    "feature test": lambda: FeatureTest(radius=0.03, cos0=0.5, sigma=SIGMA, alpha=0.01, n=500),
    "class": lambda: ClassRadius(text=TEXT, sigma=SIGMA, alpha=0.01, n=300, n_pilot=100),
    "class test": lambda: ClassAtRadius(text=TEXT, radius=0.02, sigma=SIGMA, alpha=0.01, n=500, n_pilot=100),
    "vocabulary": lambda: VocabularyRadius(text=TEXT, sigma=SIGMA, alpha=0.01, n=300, n_pilot=100),
    "vote": lambda: VoteRadius(text=TEXT, sigma=SIGMA, alpha=0.01, n=300, n_pilot=100),
    "vote test": lambda: VoteAtRadius(text=TEXT, radius=0.02, sigma=SIGMA, alpha=0.01, n=500, n_pilot=100),
    "openset": lambda: OpensetRadius(
        vectors=contrast_vectors(TEXT, [], 0.0), tau=0.2, sigma=SIGMA, alpha=0.01, n=300, n_pilot=100
    ),
    "openset test": lambda: OpensetRadius(
        vectors=contrast_vectors(TEXT, TEXT[:1], 0.2), tau=0.1, sigma=SIGMA, alpha=0.01, n=400, n_pilot=100, radius=0.01
    ),
}


def run(make: Callable[[], Certifier], *, lanes: int, order: list[Job], **options: Any) -> dict[int, Finding]:
    engine = SamplingEngine(options.pop("encode", encode), seed=1, lanes=lanes, **options)
    return {found.job.index: found.finding for found in engine.run(order, lambda _: make())}


def same(a: Finding, b: Finding) -> bool:
    """Equal but for the mean, whose last bits depend on the order of summation (it is for information)."""
    assert a.mean is not None
    assert b.mean is not None
    keys = [key for key in a.__dataclass_fields__ if key != "mean"]
    return all(getattr(a, key) == getattr(b, key) for key in keys) and bool(np.allclose(a.mean, b.mean, atol=1e-12))


@pytest.mark.parametrize("claim", CLAIMS)
def test_findings_do_not_depend_on_batches_neighbours_or_order(claim: str) -> None:
    images = jobs(5)
    base = run(CLAIMS[claim], lanes=64, order=images)
    assert len(base) == 5
    for lanes, order in ((7, images), (200, images[::-1]), (33, images[2:3])):
        other = run(CLAIMS[claim], lanes=lanes, order=order)
        assert all(same(base[index], found) for index, found in other.items())


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("lanes", [40, 256])
def test_judging_one_pass_while_the_next_runs_changes_nothing(claim: str, lanes: int) -> None:
    """On a GPU the next pass starts before the last one is judged; here the same order of events on the CPU."""
    base = run(CLAIMS[claim], lanes=64, order=jobs(5))
    calls = 0

    def sometimes_full(noisy: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 or len(noisy) > 128:
            raise RuntimeError("CUDA out of memory")
        return encode(noisy)

    engine = SamplingEngine(sometimes_full, seed=1, lanes=lanes)
    engine._depth = 1
    found = {sampled.job.index: sampled.finding for sampled in engine.run(jobs(5), lambda _: CLAIMS[claim]())}
    assert len(found) == 5
    assert all(same(base[index], found[index]) for index in base)


def test_running_out_of_memory_halves_the_pass_and_loses_nothing() -> None:
    sizes: list[int] = []

    def small(noisy: Tensor) -> Tensor:
        if len(noisy) > 20:
            raise RuntimeError("CUDA out of memory")
        sizes.append(len(noisy))
        return encode(noisy)

    base = run(CLAIMS["feature"], lanes=64, order=jobs(3))
    found = run(CLAIMS["feature"], lanes=64, order=jobs(3), encode=small)
    assert all(same(base[index], found[index]) for index in base)
    assert set(sizes) == {16}


def test_memory_that_does_not_suffice_for_one_row_is_an_error() -> None:
    def never(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(CLAIMS["feature"], lanes=4, order=jobs(1), encode=never)


@pytest.mark.parametrize("lanes", [16, 64, 256])
def test_smaller_passes_are_used_when_no_image_waits(lanes: int) -> None:
    rungs = tuple(lanes >> i for i in range(lanes.bit_length()))
    sizes: list[int] = []
    images = jobs(2)
    base = run(CLAIMS["feature test"], lanes=64, order=images)
    found = run(
        CLAIMS["feature test"], lanes=lanes, order=images, rungs=rungs, on_pass=lambda rows, _: sizes.append(rows)
    )
    assert all(same(base[index], found[index]) for index in base)
    assert set(sizes) <= set(rungs)
    assert sum(sizes) < sum(f.n for f in found.values()) + 4 * CHUNK  # padding and speculation stay small


def test_every_row_of_noise_is_fresh_and_has_the_law_that_theorems_ask_for() -> None:
    seen: list[Tensor] = []

    def watch(noisy: Tensor) -> Tensor:
        seen.append(noisy.flatten(1).clone())
        return encode(noisy)

    grey = [Job(f"grey-{i}", i, torch.full((3, 4, 4), 0.5)) for i in range(4)]
    run(CLAIMS["class"], lanes=50, order=grey, encode=watch, rungs=(50, 25, 5, 1))
    rows = torch.cat(seen)
    noise = (rows - 0.5) / SIGMA
    assert rows.dtype == torch.float32
    assert len(torch.unique(noise, dim=0)) == len(noise) == 4 * 300
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(noise)
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.75  # 48 entries a row: five standard deviations
    assert noise.abs().max() > 3.5  # not truncated
    assert rows.amax() > 1.0
    assert rows.amin() < 0.0


def test_streams_differ_by_run_image_stage_and_chunk() -> None:
    streams = [
        stream_seed(seed, name, stage)
        for seed in (0, 1)
        for name in ("a", "b", "a/b")
        for stage in ("pilot", "estimation", "inference")
    ]
    assert len(set(streams)) == len(streams)
    first = [noise_chunk(stream, number, (3, 2, 2))[row] for stream in streams for number in (0, 1) for row in (0, 31)]
    assert len({tuple(row.flatten().tolist()) for row in first}) == len(first)
    with pytest.raises(UserError, match="one of the stages"):
        stream_seed(0, "a", "clean")


def test_chunks_of_a_stream_are_independent() -> None:
    chunks = torch.stack([noise_chunk(5, number, (64,)).flatten() for number in range(8)])
    correlation = torch.corrcoef(chunks)
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.12  # 2048 entries: over five standard deviations


def test_the_clean_stage_has_no_noise() -> None:
    seen: list[Tensor] = []

    def watch(noisy: Tensor) -> Tensor:
        seen.append(noisy.clone())
        return encode(noisy)

    image = jobs(1)[0]
    run(CLAIMS["feature"], lanes=1, order=[image], encode=watch)
    assert torch.equal(seen[-1][0], image.pixels)
    assert sum(torch.equal(row[0], image.pixels) for row in seen) == 1


def test_failed_rows_count_as_the_worst_value_and_are_counted() -> None:
    def failing(noisy: Tensor) -> Tensor:
        features = encode(noisy)
        return torch.where((noisy.flatten(1)[:, :1] > 0.6), torch.nan, features)

    for claim in CLAIMS:
        good = run(CLAIMS[claim], lanes=64, order=jobs(3))
        bad = run(CLAIMS[claim], lanes=64, order=jobs(3), encode=failing)
        assert sum(found.failed for found in bad.values()) > 0, claim
        if "test" not in claim:
            assert all(bad[i].radius <= good[i].radius for i in good), claim
        assert sum(found.failed for found in good.values()) == 0


def test_an_encoder_that_only_fails_certifies_nothing() -> None:
    for claim in CLAIMS:
        found = run(CLAIMS[claim], lanes=64, order=jobs(1), encode=lambda noisy: encode(noisy) * torch.nan)
        # Rejection is a side too: its score is bounded as if every failed copy had voted for acceptance.
        assert found[0].radius == 0.0, claim


def test_undecided_images_cost_their_samples_and_decided_ones_little_more() -> None:
    engine = SamplingEngine(encode, seed=1, lanes=96)
    found: list[Sampled] = list(engine.run(jobs(6), lambda _: CLAIMS["feature test"]()))
    for sampled in found:
        used = sampled.finding.n + sampled.finding.n_pilot
        assert used <= sampled.passes <= used + 2 * 96
    assert engine.passes >= sum(sampled.passes for sampled in found)


def test_features_that_are_kept_are_those_that_were_used() -> None:
    kept: dict[tuple[int, Stage], list[np.ndarray]] = {}
    found = run(
        CLAIMS["class"],
        lanes=48,
        order=jobs(3),
        keep=lambda job, stage, rows: kept.setdefault((job.index, stage), []).append(rows),
    )
    for job in jobs(3):
        certifier = CLAIMS["class"]()
        for stage in ("pilot", "estimation"):
            certifier.take(np.concatenate(kept[job.index, stage]))  # type: ignore[index]
        assert same(certifier.finding(), found[job.index])


def rows_for(certifier: Certifier, pieces: list[int], seed: int) -> Finding:
    """Feed a certifier rows of one stream per stage, in pieces of the given sizes over and over."""
    draws = np.random.default_rng(seed)
    streams = {stage: draws.normal([1.0, 0.2, 0.0, 0.0], 0.6, (600, 4)) for stage in ("clean", "pilot", "estimation")}
    units = {stage: rows / np.linalg.norm(rows, axis=1, keepdims=True) for stage, rows in streams.items()}
    used = dict.fromkeys(units, 0)
    turn = 0
    while (wanted := certifier.request()) is not None:
        size = min(pieces[turn % len(pieces)], wanted.most)
        turn += 1
        certifier.take(units[wanted.stage][used[wanted.stage] : used[wanted.stage] + size])
        used[wanted.stage] += size
    return certifier.finding()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(CLAIMS)), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 5))
def test_findings_do_not_depend_on_the_pieces_rows_come_in(claim: str, pieces: list[int], seed: int) -> None:
    assert same(rows_for(CLAIMS[claim](), pieces, seed), rows_for(CLAIMS[claim](), [CHUNK], seed))


def test_looks_are_at_whole_chunks_only() -> None:
    for pieces in ([1], [50], [31, 2]):
        assert rows_for(CLAIMS["feature test"](), pieces, 0).n % CHUNK == 0


def test_a_stage_takes_no_more_rows_than_planned() -> None:
    certifier = CLAIMS["class"]()
    with pytest.raises(UserError, match="room for 100 more samples and got 101"):
        certifier.take(np.tile([1.0, 0.0, 0.0, 0.0], (101, 1)))
