"""Ways to get the sampling wrong, each planted to show its harm or refused, and the engine shown to be free of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import binom
from torch import Tensor, nn

from robustvlm.certify import ClassRadius, FeatureRadius, Finding, Job, SamplingEngine, VoteRadius
from robustvlm.certify.means import betting_lower
from robustvlm.certify.noise import stream_seed
from robustvlm.certify.threats import read_noise
from robustvlm.commands.certify.encoder import NoisyEncoder, probe_encoder
from robustvlm.errors import UserError
from robustvlm.models import VLM

SIGMA, B = 0.5, 0.9
TEXT = np.eye(2)


def half_space(noisy: Tensor) -> Tensor:
    """The first text's direction where the first pixel is at most B, else the second's: votes are a half-space."""
    below = noisy.flatten(1)[:, 0] <= B
    return torch.stack([below.float(), 1.0 - below.float()], dim=1)


class Watched:
    """An encoder that keeps the noise it was shown; the images are black."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, noisy: Tensor) -> Tensor:
        self.rows.append(noisy.clone().flatten(1))
        return half_space(noisy)

    @property
    def noise(self) -> Tensor:
        return torch.cat(self.rows)


def certify(
    encode: object, ids: list[str], *, claim: str = "vote", seed: int = 0, n: int = 300, alpha: float = 0.05
) -> dict[str, Finding]:
    engine = SamplingEngine(encode, seed=seed, lanes=100)  # type: ignore[arg-type]
    jobs = [Job(name, i, torch.zeros(3, 2, 2)) for i, name in enumerate(ids)]
    common = {"sigma": SIGMA, "alpha": alpha, "n": n, "n_pilot": 100}
    make = {
        "vote": lambda _: VoteRadius(text=TEXT, **common),
        "class": lambda _: ClassRadius(text=TEXT, **common),
        "feature": lambda _: FeatureRadius(cos0=0.5, baselines=False, **common),
    }[claim]
    return {sampled.job.image_id: sampled.finding for sampled in engine.run(jobs, make)}


def test_no_draw_is_used_twice_by_images_stages_or_rows() -> None:
    encode = Watched()
    certify(encode, [f"image {i}" for i in range(7)])
    noise = encode.noise
    assert len(noise) == 7 * 300
    assert len({row.numpy().tobytes() for row in noise}) == len(noise)
    assert noise.dtype == torch.float32
    assert len(noise.unique()) > 0.99 * noise.numel()  # bfloat16 would leave a few thousand values
    assert (noise / SIGMA).mean().item() == pytest.approx(0.0, abs=0.03)
    assert (noise / SIGMA).std().item() == pytest.approx(1.0, abs=0.03)
    assert torch.corrcoef((noise / SIGMA).T).fill_diagonal_(0.0).abs().max() < 0.12


def test_one_draw_for_several_rows_would_break_the_bound() -> None:
    rng = np.random.default_rng(0)
    mean, n, copies = 0.85, 400, 20
    missed = [
        betting_lower(np.repeat(rng.random(n // k) < mean, k).astype(float), 0.05) > mean
        for k in (1, copies)
        for _ in range(300)
    ]
    assert np.mean(missed[:300]) <= 0.05 < np.mean(missed[300:])


def test_streams_differ_by_run_image_and_stage() -> None:
    seeds = {
        stream_seed(run, image, stage)
        for run in range(3)
        for image in ("a", "b", "ab")
        for stage in ("pilot", "estimation", "inference")
    }
    assert len(seeds) == 27
    with pytest.raises(UserError, match="one of the stages"):
        stream_seed(0, "a", "training")


def test_an_images_noise_depends_on_nothing_but_its_address() -> None:
    alone, among = Watched(), Watched()
    certify(alone, ["x"])
    certify(among, ["a", "b", "x", "c"])
    theirs = {row.numpy().tobytes() for row in among.noise}
    assert all(row.numpy().tobytes() in theirs for row in alone.noise)
    other = Watched()
    certify(other, ["x"], seed=1)
    assert not {row.numpy().tobytes() for row in other.noise} & theirs


def test_votes_certified_through_the_engine_are_rarely_beyond_the_truth() -> None:
    # The vote's share is that of a half-space: its true radius is known, and the certificate is tight for it.
    found = certify(half_space, [f"image {i}" for i in range(400)], alpha=0.05)
    radii = np.array([finding.radius for finding in found.values()])
    assert {finding.prediction for finding in found.values()} == {0}
    assert np.mean(radii > B) <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(radii) > 0.7 * B
    assert ndtr(B / SIGMA) < 1.0


def test_a_label_chosen_on_the_estimation_samples_would_be_wrong_too_often() -> None:
    # Two classes at even odds: no radius is true. The pilot's label abstains but for alpha; the majority label of the
    # same samples is "certified" twice as often.
    rng = np.random.default_rng(0)
    planted = pilot = 0
    for _ in range(1500):
        votes = rng.random(200) < 0.5
        share = max(votes.mean(), 1.0 - votes.mean())
        winner = votes if votes.mean() == share else ~votes
        planted += bool(betting_or_binomial(winner, 0.05) > 0.5)
        pilot += bool(betting_or_binomial(votes, 0.05) > 0.5)
    assert pilot <= 1500 * 0.05 * 1.25 < planted


def betting_or_binomial(votes: np.ndarray, alpha: float) -> float:
    from robustvlm.certify.means import clopper_pearson_lower

    return float(clopper_pearson_lower(int(votes.sum()), len(votes), alpha))


def test_noise_is_of_the_level_that_the_radius_counts_in() -> None:
    """One place for sigma: the certifier's. The true radius of the half-space is B whatever sigma is."""
    for sigma in (0.05, SIGMA):
        watched = Watched()
        engine = SamplingEngine(watched, seed=0, lanes=100)
        make = ClassRadius(text=TEXT, sigma=sigma, alpha=0.05, n=2000, n_pilot=100)
        (sampled,) = engine.run([Job("a", 0, torch.zeros(3, 2, 2))], lambda _: make)  # noqa: B023
        assert watched.noise.std().item() == pytest.approx(sigma, rel=0.03)
        assert sampled.sigma == make.sigma == sigma
        assert sampled.finding.radius <= B
    with pytest.raises(TypeError, match="sigma"):
        SamplingEngine(half_space, sigma=0.05, seed=0, lanes=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": 0.51}, {"alpha": 0.04}, {"n": 301}, {"n_pilot": 99}, {"text": -TEXT}, {"claim": VoteRadius},
        {"seed": 1}, {"image": 0.5}, {"settings": "of another model"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_whatever_decides_a_claim_draws_noise_of_its_own(change: dict[str, object]) -> None:
    def noise(**options: object) -> Tensor:
        level = float(options["sigma"])  # type: ignore[arg-type]
        watched = Watched()
        engine = SamplingEngine(watched, seed=options.pop("seed"), lanes=100, settings=options.pop("settings"))  # type: ignore[arg-type]
        pixels, make = torch.full((3, 2, 2), options.pop("image")), options.pop("claim")  # type: ignore[call-overload]
        list(engine.run([Job("a", 0, pixels)], lambda _: make(**options)))  # type: ignore[operator]
        return (watched.noise - pixels.flatten()) / level

    same = {
        "text": TEXT, "sigma": SIGMA, "alpha": 0.05, "n": 300, "n_pilot": 100, "claim": ClassRadius, "seed": 0,
        "image": 0.0, "settings": None,
    }  # fmt: skip
    first, again, other = (noise(**one) for one in (same, same, same | change))
    assert torch.equal(first, again)
    nearest = torch.cdist(first[:50], other[:50]).min()
    assert nearest > 0.1  # no row of one is a row of the other, at another place or scale


def tuned(runs: int, *, settings: str | None) -> int:
    """Count false certificates of classes that were fitted to the features of a first look, in a second look.

    Features are uniform on the sphere: no class is nearer than another, so that any radius above zero is false.
    """
    encode = lambda noisy: torch.nn.functional.normalize(noisy.flatten(1), dim=1)  # noqa: E731
    common = {"sigma": SIGMA, "alpha": 0.05, "n": 264, "n_pilot": 64}
    seen: list[np.ndarray] = []
    keep = lambda job, stage, rows: seen.append(rows)  # noqa: E731, ARG005
    false = 0
    for run in range(runs):
        seen.clear()
        job = Job(str(run), 0, torch.zeros(3, 8, 8))
        engine = SamplingEngine(encode, seed=0, lanes=264, settings=settings, keep=keep)
        list(engine.run([job], lambda _: ClassRadius(text=np.eye(2, 192), **common, baselines=False)))
        best = np.concatenate(seen).mean(axis=0, keepdims=True)
        again = SamplingEngine(encode, seed=0, lanes=264, settings=settings)
        text = np.concatenate([best, -best])
        (found,) = again.run([job], lambda _: ClassRadius(text=text, **common, baselines=False))  # noqa: B023
        false += found.finding.radius > 0.0
    return false


def test_prompts_fitted_to_a_first_look_certify_nothing_false_in_the_next() -> None:
    assert tuned(25, settings="noise that the prompts do not enter") > 10  # the harm: most of them
    false = tuned(60, settings=None)
    assert binom.sf(false - 1, 60, 0.05) > 1e-4


class Plain(VLM):
    """A linear encoder with dropout, or with batch statistics."""

    def __init__(self, *, batch: bool) -> None:
        super().__init__(spec="plain", image_size=4, logit_scale=10.0)
        torch.manual_seed(0)
        self.layer, self.drop, self.batch = nn.Linear(48, 5), nn.Dropout(0.5), batch
        self.train()

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.drop(self.layer(pixels.flatten(1)))
        return features - features.mean(dim=0) if self.batch else features

    def _text_features(self, texts: list[str]) -> Tensor:
        return torch.eye(5)[: len(texts)]


def test_dropout_is_off_and_batch_statistics_are_refused() -> None:
    encoder = NoisyEncoder(Plain(batch=False))
    x = torch.rand(6, 3, 4, 4)
    assert torch.equal(encoder(x), encoder(x))
    assert probe_encoder(encoder, x, read_noise("0.25"), 8, model="plain").dim == 5
    with pytest.raises(UserError, match="depending on the others in its batch"):
        probe_encoder(NoisyEncoder(Plain(batch=True)), x, read_noise("0.25"), 8, model="plain")


@pytest.mark.parametrize("claim", ["vote", "class", "feature"])
def test_failed_passes_are_counted_against_the_certificate(claim: str) -> None:
    def failing(noisy: Tensor) -> Tensor:
        features = half_space(noisy)
        features[noisy.flatten(1)[:, 1] > SIGMA] = torch.nan  # a sixth of all rows
        return features

    good, bad = (certify(encode, ["x"], claim=claim, n=1000)["x"] for encode in (half_space, failing))
    assert bad.failed > 100
    assert bad.n + bad.n_pilot == good.n + good.n_pilot == 1000
    assert bad.radius < good.radius
