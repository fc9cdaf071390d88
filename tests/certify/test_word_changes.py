"""Words of the prompts and the image changed at once (T24): the joint bound, its samples, and the search for words."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm

from robustvlm.certify.claims.changed_words import (
    Prompts,
    WordsQuantity,
    WordsRadius,
    changed_tables,
    require_wordings,
    words_radius,
)
from robustvlm.certify.local_noise import read_local_noise
from robustvlm.certify.wordings import Wordings
from robustvlm.defenses import smooth
from robustvlm.defenses.local_noise import smooth_locally
from robustvlm.defenses.mixed_wordings import MixedWordings
from robustvlm.errors import UserError
from robustvlm.models import load_model

ALPHA, EACH, J = 0.05, 40, 5


def test_the_radius_is_the_least_over_all_sets_of_changed_wordings():
    votes = [40, 38, 37, 39, 30]
    for r in range(3):
        found = []
        for changed in combinations(range(J), r):
            left = [votes[i] for i in range(J) if i not in changed]
            n, wins, share = EACH * len(left), sum(left), 0.5 * J / len(left)
            lower = beta.ppf(ALPHA, wins, n - wins + 1)
            found.append(max(0.0, norm.ppf(lower) - norm.ppf(share)) if lower > share else 0.0)
        assert words_radius(votes, EACH, r, 1.0, ALPHA) == pytest.approx(min(found), abs=1e-9)
    assert words_radius([EACH] * J, EACH, 3, 1.0, ALPHA) == 0.0


def shares_after(edges, r, eps):
    """Return the share of the votes that is left when the attacker takes the best r wordings and moves by eps.

    In this world wording i puts an image into the class where z < edge_i; z is all that the image has.
    """
    kept = np.sort(norm.cdf(np.asarray(edges)[None] - np.asarray(eps)[:, None]), axis=1)[:, : len(edges) - r]
    return kept.sum(axis=1) / len(edges)


def true_radius(edges, r):
    steps = np.linspace(0.0, 4.0, 40_001)
    lost = shares_after(edges, r, steps) <= 0.5
    return float(steps[np.argmax(lost)])


@pytest.mark.parametrize(
    "edges", [[1.5] * 5, [0.9] * 5, [2.5, 2.0, 1.5, 1.0, 0.5], [0.1] * 5, [3.0, 3.0, 3.0, -0.3, 0.5]]
)
@pytest.mark.parametrize("r", [0, 1, 2])
def test_few_certificates_of_the_worst_wordings_are_false(edges, r):
    """20,000 runs; equal edges attain the bound for the wordings that are left."""
    rng, runs = np.random.default_rng(0), 20_000
    votes = rng.binomial(EACH, norm.cdf(edges), (runs, len(edges)))
    known: dict = {}
    radii = np.array(
        [known.setdefault(key, words_radius(key, EACH, r, 1.0, ALPHA)) for key in map(tuple, np.sort(votes))]
    )
    true = true_radius(edges, r)
    false = int((radii > true + 1e-4).sum())
    assert binom.sf(false - 1, runs, ALPHA) > 1e-3
    assert radii.max() > 0.4 * true or true < 0.2


def test_a_mean_over_wordings_attains_the_bound_exactly():
    """With all votes known, a half-space that wordings share loses its majority just at the radius that is stated."""
    for r in (1, 2):
        p, c = norm.cdf(1.5), 1.0 - r / J
        stated = norm.ppf(p) - norm.ppf(0.5 / c)
        assert true_radius([1.5] * J, r) == pytest.approx(stated, abs=2e-4)


def certifier(words, wordings=None, **options):
    tables = wordings or Wordings((np.tile(np.eye(2)[0], (J, 1)), np.tile(np.eye(2)[1], (J, 1))), aligned=True)
    how = {"text": np.eye(2), "sigma": 0.5, "alpha": ALPHA, "n": 260, "n_pilot": 60}
    return WordsRadius(wordings=tables, words=words, **{**how, **options})


def test_copies_read_the_wordings_by_turns_and_each_is_counted_by_its_own():
    vectors = np.tile(np.eye(2), (3, 1, 1))
    vectors[1] = vectors[1][::-1]  # the second wording calls everything by the other name
    words = Wordings((vectors[:, 0], vectors[:, 1]), aligned=True)
    one = certifier(1, words, n=302, n_pilot=60)
    one.take(np.tile(np.eye(2)[:1], (60, 1)))
    one.take(np.tile(np.eye(2)[:1], (242, 1)))
    found = one.finding()
    assert found.prediction == 0
    assert found.columns["votes"] == pytest.approx(2 / 3)
    assert found.columns["words0_radius"] == words_radius([80, 0, 80], 80, 0, 0.5, ALPHA) > 0
    assert found.radius == found.columns["words1_radius"] == 0.0


def test_the_columns_fall_with_the_number_of_words_and_the_last_is_the_certificate():
    one = certifier(2, deployed=100)
    one.take(np.tile(np.eye(2)[:1], (60, 1)))
    one.take(np.tile(np.eye(2)[:1], (200, 1)))
    found = one.finding()
    radii = [found.columns[f"words{r}_radius"] for r in range(3)]
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] == found.radius > 0
    assert found.columns["deployed_radius"] <= found.radius
    assert certifier(1).key != certifier(2).key


def test_the_search_for_words_changes_those_that_cost_most_votes():
    book = {"a cat": [1.0, 0.0], "a dog": [0.0, 1.0], "the cat": [0.8, 0.6], "the dog": [0.0, 1.0]}
    texts = (("a cat", "a dog"), ("the cat", "the dog"), ("one cat", "one dog"))
    book |= {"one cat": [1.0, 0.0], "one dog": [0.0, 1.0]}

    def encode(some):  # a changed text is one of these, or says nothing
        return np.array([book.get(text, [-0.6, 0.8]) for text in some])

    words = Wordings(tuple(np.stack([encode([texts[j][k]])[0] for j in range(3)]) for k in range(2)), aligned=True)
    prompts = Prompts(texts, ("a", "the", "one", "cat", "dog"))
    rows = np.tile([[0.96, 0.28]], (20, 1))
    tables, said = changed_tables(words, prompts, rows, 0, 1, encode)
    assert len(said) == 1
    quantity = WordsQuantity(tables=tables, label=0, radius=0.1, logit_scale=10.0)
    assert quantity.value(rows) == pytest.approx(2 / 3)  # of one wording, all votes
    tables, said = changed_tables(words, prompts, rows, 0, 2, encode)
    assert WordsQuantity(tables=tables, label=0, radius=0.1, logit_scale=10.0).value(rows) == pytest.approx(1 / 3)
    assert WordsQuantity(tables=words.tables, label=0, radius=0.1, logit_scale=10.0).value(rows) == 1.0
    aims = quantity.score(torch.tensor(rows)[None].expand(3, -1, -1), torch.arange(3))
    assert aims.shape == (3,)
    assert quantity.upper(rows, 0.001) > quantity.value(rows)


def test_the_deployed_model_reads_one_wording_a_copy():
    vlm, names, templates = smooth(load_model("tiny"), 0.02), ["apple", "dog"], ["{}", "a {}", "an icon of a {}"]
    model = MixedWordings(vlm, names, templates)
    vlm.noisy_features = lambda pixels, n: torch.eye(2)[0].expand(len(pixels), n, 2)
    model.tables = torch.stack([torch.eye(2), torch.eye(2), torch.eye(2).flip(0)])  # one of three names it otherwise
    votes = model.votes(torch.zeros(2, 3, 64, 64), 3000)
    assert votes.sum(dim=1).tolist() == [3000, 3000]
    assert votes[:, 0].tolist() == pytest.approx([2000, 2000], abs=150)
    assert model.predict(torch.zeros(2, 3, 64, 64), 3000) == [0, 0]
    with pytest.raises(UserError, match="at least two templates"):
        MixedWordings(vlm, names, ["{}"])
    local = smooth_locally(load_model("tiny"), read_local_noise("0.02,0.05:0.1:0.05"))
    with pytest.raises(UserError, match="smoothed at one noise level"):
        MixedWordings(local, names, templates)


def test_too_few_wordings_and_too_large_an_alpha_are_refused():
    words = Wordings((np.eye(2)[[0, 0, 0, 0]], np.eye(2)[[1, 1, 1, 1]]), aligned=True)
    require_wordings(words, 1)
    with pytest.raises(UserError, match="at least 5 wordings"):
        require_wordings(words, 2)
    with pytest.raises(UserError, match="below alpha"):
        words_radius([1], 1, 0, 1.0, 0.3)


def test_another_threat_has_a_reach_of_its_own():
    """Uniform noise loses votes in proportion to an l1 distance: the radius of Gaussian noise would be too large."""
    votes, sigma = [40] * J, 0.25
    lower = beta.ppf(ALPHA, 160, 1)  # of the four wordings that are left
    found = words_radius(votes, EACH, 1, sigma, ALPHA, threat="l1")
    assert found == pytest.approx(2.0 * 3**0.5 * sigma * (lower - 0.625))
    assert found < words_radius(votes, EACH, 1, sigma, ALPHA)
