"""Closed forms, invariances and errors of the scores."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detect_clouds import CLASSES, DIM, Clouds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.core import LAMBDA_INF
from robustvlm.detect import (
    GDA,
    KNN,
    MCM,
    MSP,
    SCORES,
    SDIS,
    ClassMixtures,
    COOkeD,
    DeltaEnergy,
    Detector,
    Energy,
    FittedDetector,
    Head,
    Hinge,
    Mahalanobis,
    MaxLogit,
    NegLabel,
    ReAct,
    Supplies,
    ViM,
    energy_change,
    make_scores,
    outside,
    parse_scores,
    read_words,
    tree_words,
)
from robustvlm.detect.base import NotFitted
from robustvlm.detect.catalog import own_detector
from robustvlm.detect.distances import choose_alpha
from robustvlm.detect.logits import GEN, free_energy
from robustvlm.detect.mixtures import fit_probe, mean_probabilities
from robustvlm.detect.words import mine_negatives, safe_rows, words_outside
from robustvlm.errors import UserError


@pytest.fixture(scope="session")
def made(clouds: Clouds) -> dict[str, Detector]:
    found, skipped = make_scores(SCORES, clouds.supplies)
    assert list(found) == list(SCORES)
    assert not skipped
    return found


# ---- closed forms


def test_uniform_logits_have_known_scores() -> None:
    zero = torch.zeros(1, CLASSES)
    head = Head.of_logits(CLASSES)
    assert MSP(head).score(zero).sigmoid().item() == pytest.approx(1 / CLASSES)
    assert Energy(head).score(zero).item() == pytest.approx(math.log(CLASSES))
    assert DeltaEnergy(head).score(zero).item() == pytest.approx(0.0, abs=1e-6)


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=8), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_energy_change_by_hand(values: list[float], n_reset: int) -> None:
    """Both readings written out; they agree where one cosine is reset."""
    logits = torch.tensor([values], dtype=torch.float64)
    top = sorted(range(len(values)), key=lambda i: -values[i])[:n_reset]
    energy = -math.log(sum(map(math.exp, values)))
    joint = -math.log(sum(1.0 if i in top else math.exp(v) for i, v in enumerate(values)))
    singles = [-math.log(sum(1.0 if i == j else math.exp(v) for i, v in enumerate(values))) for j in top]
    assert energy_change(logits, n_reset).item() == pytest.approx(joint - energy, abs=1e-9)
    assert energy_change(logits, n_reset, "mean").item() == pytest.approx(sum(singles) / n_reset - energy, abs=1e-9)
    assert torch.allclose(energy_change(logits, 1), energy_change(logits, 1, "mean"))


@given(st.lists(st.floats(0.0, 0.35), min_size=3, max_size=9, unique=True), st.sampled_from([60.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_energy_change_of_one_cosine_ranks_as_msp_at_the_model_s_own_temperature(
    cosines: list[float], scale: float
) -> None:
    """The closed form: -log(1 - p1 + 1 / Z), where Z is the sum of exponentials, and p1 the largest softmax."""
    logits = scale * torch.tensor([cosines], dtype=torch.float64)
    total, rest = logits.exp().sum(), logits.exp().sort().values[0, :-1].sum()
    expected = -torch.log(rest / total + 1 / total)  # 1 - p1 without its rounding
    assert energy_change(logits, 1).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)


def test_energy_change_of_one_cosine_is_msp_by_rank_and_another_score_at_another_temperature() -> None:
    draws = torch.Generator().manual_seed(3)
    texts = F.normalize(torch.randn(20, 8, generator=draws, dtype=torch.float64) + 2.0, dim=1)
    z = F.normalize(torch.randn(60, 8, generator=draws, dtype=torch.float64) + 2.0, dim=1)
    head = Head(texts, 60.0)
    order = MSP(head).score(z).argsort()
    assert torch.equal(DeltaEnergy(head, n_reset=1).score(z).argsort(), order)
    assert not torch.equal(DeltaEnergy(head, n_reset=1, temperature=60.0).score(z).argsort(), order)
    assert not torch.equal(DeltaEnergy(head, n_reset=2).score(z).argsort(), order)
    # The temperature by its definition: T times the change of energy of logits over T.
    found = DeltaEnergy(head, temperature=30.0).score(z)
    assert torch.allclose(found, 30.0 * energy_change(2.0 * z @ texts.T))


def test_a_temperature_reaches_every_score_from_energies(clouds: Clouds) -> None:
    names = ("energy", "delta-energy", "delta-energy-mean", "ash", "react", "vim")
    labels = torch.arange(len(clouds.known)) % CLASSES
    at = {
        value: make_scores(names, Supplies(clouds.head, features=clouds.known, labels=labels, temperature=value))[0]
        for value in (1.0, 8.0)
    }
    for name in names:
        one, eight = (at[value][name].score(clouds.known) for value in (1.0, 8.0))
        assert not torch.equal(one.argsort(), eight.argsort()), name


def test_there_is_one_default_weight_of_antibodies() -> None:
    from robustvlm.commands.certify import CertifySettings
    from robustvlm.commands.immunize import ImmunizeSettings

    weights = [inspect.signature(part).parameters["weight"].default for part in (SDIS, Hinge)]
    assert [*weights, ImmunizeSettings().lambda_inf, CertifySettings().weight] == 4 * [LAMBDA_INF]


def test_s_dis_without_a_safe_word_is_refused(clouds: Clouds) -> None:
    made, skipped = make_scores(["s-dis"], Supplies(clouds.head, words=clouds.head.class_embeddings))
    assert not made
    assert "nearer to a known class" in skipped[0].reason


def test_resetting_every_cosine_leaves_the_energy() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0]])
    assert torch.allclose(energy_change(logits, 9), free_energy(logits) - math.log(3))


def test_s_dis_by_hand() -> None:
    z = F.normalize(torch.tensor([[1.0, 2.0, 2.0]]), dim=1)
    detector = SDIS(torch.eye(3)[:2], torch.eye(3)[2:], weight=0.5)
    assert detector.score(z).item() == pytest.approx(2 / 3 - 0.5 * 2 / 3)
    assert replace(detector, weight=0.0).score(z).item() == pytest.approx(2 / 3)


def test_neglabel_by_hand(clouds: Clouds) -> None:
    """The mean over groups of the share that the known classes have, here written with plain exponentials."""
    negatives, head = clouds.words[:7], clouds.head
    found = NegLabel(head, negatives, n_groups=3).score(clouds.known).sigmoid()
    known = head.logits(clouds.known).exp().sum(1)
    shares = []
    for group in range(3):
        others = (head.logit_scale * clouds.known @ negatives[group::3].T).exp().sum(1)
        shares.append(known / (known + others))
    assert torch.allclose(found, torch.stack(shares).mean(0), atol=1e-10)


def test_neglabel_does_not_round_to_ties() -> None:
    """Shares so near 1 that float32 cannot tell them apart are still ranked."""
    head = Head(torch.eye(3)[:2], 100.0)
    z = F.normalize(torch.tensor([[1.0, 0.0, 0.02], [1.0, 0.0, 0.0]]), dim=1)
    near, nearer = NegLabel(head, torch.eye(3)[2:]).score(z)
    assert nearer > near > 50


def test_mining_keeps_the_farthest_words() -> None:
    words = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.1], [0.0, -1.0]]), dim=1)
    assert mine_negatives(words, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), share=0.5).tolist() == [2, 3]
    assert len(mine_negatives(words, torch.eye(2), share=0.01)) == 1


def test_mahalanobis_is_euclidean_for_round_clouds() -> None:
    """Two classes of unit covariance: the score is minus the squared distance to the nearer mean."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    features, labels = torch.cat([corners, corners + 10]), torch.arange(2).repeat_interleave(4)
    point = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert Mahalanobis("empirical").fit_features(features, labels).score(point).item() == pytest.approx(-25.0)


def test_one_component_is_mahalanobis(clouds: Clouds) -> None:
    mixture = ClassMixtures(1).fit_features(clouds.fit, clouds.labels)
    single = Mahalanobis().fit_features(clouds.fit, clouds.labels)
    assert torch.allclose(mixture.score(clouds.unknown), single.score(clouds.unknown) / 2, atol=1e-9)


def test_mixtures_find_two_clouds_in_a_class() -> None:
    """A class of two clouds: a point between them is known to one Gaussian, and not to two."""
    draws = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(80, 3, generator=draws, dtype=torch.float64)
    centres = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64).repeat(40, 1)
    labels, middle = torch.zeros(80, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.float64)
    own = centres[:1] + 0.05
    one = ClassMixtures(1, "empirical").fit_features(centres + noise, labels)
    two = ClassMixtures(2, "empirical").fit_features(centres + noise, labels)
    assert one.score(middle) > one.score(own)
    assert two.score(middle) < two.score(own) - 10


def test_ensemble_of_equal_heads_is_that_head() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    assert torch.allclose(mean_probabilities([logits, logits]), logits.log_softmax(1))


def test_gda_chooses_the_half_that_is_right(clouds: Clouds) -> None:
    """With class names in the wrong order the texts mislead, and the weight of the images must be large."""
    wrong = GDA(Head(clouds.head.class_embeddings.flip(0), 20.0)).fit_features(clouds.fit, clouds.labels)
    chosen = choose_alpha(wrong, clouds.fit, clouds.labels)
    assert chosen.alpha >= 1.0
    assert (chosen.logits(clouds.known).argmax(1) == torch.arange(CLASSES).repeat(12)).double().mean() > 0.95


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=7), st.floats(0.05, 0.95), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_generalised_entropy_by_hand(values: list[float], gamma: float, temperature: float) -> None:
    powers = [math.exp(value / temperature) for value in values]
    # What is left beside a sure answer is the sum of the others: 1 less its probability would have few digits.
    leading = sorted(range(len(powers)), key=lambda i: powers[i], reverse=True)[:3]
    total, left = sum(powers), {i: sum(powers[:i] + powers[i + 1 :]) for i in leading}
    expected = -sum((powers[i] / total * (left[i] / total)) ** gamma for i in leading)
    logits = torch.tensor([values], dtype=torch.float64)
    found = GEN(Head.of_logits(len(values)), temperature=temperature, gamma=gamma, leading=3).score(logits)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_generalised_entropy_tells_sure_answers_apart_in_single_precision() -> None:
    """At CLIP's temperature the leading probability rounds to 1; the score still ranks by how much is left."""
    gaps = torch.tensor([20.0, 30.0, 60.0])
    score = GEN(Head.of_logits(2)).score(torch.stack([gaps, torch.zeros(3)], dim=1))
    assert (score.diff() > 0).all()
    assert torch.allclose(score, -2 * (-0.1 * gaps).exp(), rtol=1e-3)


# ---- the user's own


def test_what_a_user_s_score_has_to_be(clouds: Clouds) -> None:
    head = clouds.supplies.head

    class Crowd(MaxLogit):
        def score(self, features: Tensor) -> Tensor:
            return super().score(features) - super().score(features).mean()

    class Wide(MaxLogit):
        def score(self, features: Tensor) -> Tensor:
            return self.head.logits(features)

    for make, said in [
        (lambda _: Crowd(head), "must depend on that image alone"),
        (lambda _: Wide(head), "must return floats"),
        (lambda _: 3, "expected a detector .*, got an int"),
        (lambda _: 1 / 0, "failed: ZeroDivisionError"),
    ]:
        with pytest.raises(UserError, match=said):
            own_detector("my:score", make, clouds.supplies)
    learnt = own_detector("my:score", lambda _: KNN(k=3), clouds.supplies)
    assert torch.equal(learnt.score(clouds.known), KNN(k=3).fit_features(clouds.fit, clouds.labels).score(clouds.known))


# ---- invariances


@pytest.mark.parametrize("name", SCORES)
def test_a_score_depends_on_its_image_alone(made: dict[str, Detector], clouds: Clouds, name: str) -> None:
    detector = made[name]
    whole = detector.score(clouds.known)
    single = torch.cat([detector.score(row[None]) for row in clouds.known])
    assert torch.allclose(whole, single, atol=1e-9)
    assert torch.equal(detector.score(clouds.known), whole)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_has_a_true_gradient(made: dict[str, Detector], clouds: Clouds, name: str) -> None:
    """Attacks climb along it: it must be finite, and foretell the change of the score."""
    z = clouds.unknown[:4].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(made[name].score(z).sum(), z)
    assert bool(slope.isfinite().all())
    assert bool((slope.norm(dim=1) > 0).all())
    step = 1e-6 * F.normalize(slope, dim=1)
    with torch.no_grad():
        change = made[name].score(z + step) - made[name].score(z - step)
    assert torch.allclose(change / 2e-6, slope.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if "images" in score.needs])
def test_the_order_of_images_to_learn_from_does_not_matter(clouds: Clouds, name: str) -> None:
    order = torch.randperm(len(clouds.fit), generator=torch.Generator().manual_seed(3))
    shuffled = replace(clouds.supplies, features=clouds.fit[order], labels=clouds.labels[order])
    first = SCORES[name].made(clouds.supplies).score(clouds.unknown)
    # Mixtures start from drawn images, which the order changes; they end at the same density or at one like it.
    close = torch.allclose(first, SCORES[name].made(shuffled).score(clouds.unknown), rtol=1e-3, atol=1e-3)
    assert close or name == "mixtures"


@pytest.mark.parametrize("name", SCORES)
def test_float32_ranks_as_float64(made: dict[str, Detector], clouds: Clouds, name: str) -> None:
    wide, narrow = made[name].score(clouds.unknown), made[name].score(clouds.unknown.float())
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), wide, rtol=1e-3, atol=1e-3)


def test_rotating_everything_changes_nothing(clouds: Clouds) -> None:
    """Scores of angles and distances do not know the axes; ReAct, ASH and KR-NFT look at single entries and do."""
    draws = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=draws, dtype=torch.float64)).Q
    turned = Supplies(
        Head(clouds.head.class_embeddings @ turn, clouds.head.logit_scale),
        features=clouds.fit @ turn,
        labels=clouds.labels,
        words=clouds.words @ turn,
        stream=clouds.stream @ turn,
        negatives=clouds.words[::2] @ turn,
    )
    for name in (name for name in SCORES if name not in ("react", "ash", "krnft")):
        before = SCORES[name].made(clouds.supplies).score(clouds.unknown)
        after = SCORES[name].made(turned).score(clouds.unknown @ turn)
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-4), name


def test_state_holds_what_decides(made: dict[str, Detector], clouds: Clouds) -> None:
    learnt = made["mahalanobis"].state()
    assert isinstance(learnt["gaussians.means"], Tensor)
    assert learnt["covariance"] == "ledoit-wolf"
    moved = made["gda"].to("cpu")
    assert torch.equal(moved.score(clouds.known), made["gda"].score(clouds.known))


# ---- words and catalogue


def test_words_leave_out_classes_and_their_groups() -> None:
    from robustvlm.data import open_data

    source = open_data("emoji")
    words = outside(tree_words(), source.class_names, source.tree)
    assert "mammal" not in words
    assert not {"dog", "Dog"} & set(words)
    assert len(words) == len(set(words)) > 1000


def test_groups_that_hold_a_class_are_no_words_where_the_data_have_no_tree(tmp_path: Path) -> None:
    words = words_outside(["Dogs", "cat", "apple"], None)
    assert not {"dog", "animal", "mammal", "canine", "living thing", "fruit", "edible fruit"} & set(words)
    assert {"wolf", "fish", "vehicle"} & set(words)
    # In words of one's own a plural is no other thing.
    (tmp_path / "words.txt").write_text("dogs\nanimal\nwolf\n")
    assert words_outside(["dog"], None, tmp_path / "words.txt") == ("animal", "wolf")


def test_words_too_near_a_class_are_not_safe(clouds: Clouds) -> None:
    texts = clouds.head.class_embeddings
    words = torch.cat([texts[:1], F.normalize(-texts.sum(0, keepdim=True), dim=1)])
    assert safe_rows(words, texts).tolist() == [1]


def test_words_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "words.txt").write_text("wolf\n\n# no word\nwolf\nsea lion\n")
    assert read_words(tmp_path / "words.txt") == ("wolf", "sea lion")
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no word"):
        read_words(tmp_path / "none.txt")
    with pytest.raises(UserError, match="no words file"):
        read_words(tmp_path / "absent.txt")


def test_what_cannot_be_made_is_said(clouds: Clouds) -> None:
    made, skipped = make_scores(SCORES, Supplies(Head.of_logits(4), encoder=False))
    assert list(made) == ["msp", "max-logit", "energy", "gen"]
    assert {item.name: "encoder" in item.reason for item in skipped} == {
        name: True for name in SCORES if name not in made
    }
    made, skipped = make_scores(SCORES, Supplies(clouds.head))
    reasons = {item.name: item.reason for item in skipped}
    assert "--fit" in reasons["knn"]
    assert "--words" in reasons["s-dis"]
    few_words = Supplies(clouds.head, words=clouds.words)
    assert "--stream" in make_scores(["adaneg"], few_words)[1][0].reason
    # One image: no variance, no neighbours, and still no crash.
    few = Supplies(clouds.head, features=clouds.fit[:1], labels=clouds.labels[:1])
    made, skipped = make_scores(["mahalanobis", "knn", "vim"], few)
    assert "knn" in made
    assert any("do not vary" in item.reason for item in skipped)


def test_features_that_span_no_more_than_the_principal_space_are_no_features_for_vim() -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 192, generator=draws), dim=1)
    labels = torch.arange(40) % 4
    with pytest.raises(UserError, match="40 features to fit lie in at most 96 dimensions"):
        ViM(Head(torch.eye(192)[:4], 10.0)).fit_features(features, labels)
    # Many images in few dimensions are no better: what is outside is rounding.
    flat = torch.nn.functional.normalize(torch.randn(300, 20, generator=draws) @ torch.randn(20, 192), dim=1)
    with pytest.raises(UserError, match="pass more images"):
        ViM(Head(torch.eye(192)[:4], 10.0)).fit_features(flat, torch.arange(300) % 4)
    assert ViM(Head(torch.eye(192)[:4], 10.0), dim=20).fit_features(features, labels).residual is not None


def test_lists_of_scores() -> None:
    assert parse_scores("all") == tuple(name for name, score in SCORES.items() if score.usual)
    assert parse_scores("gen, adaneg, krnft, lapt, sdm, all") == tuple(SCORES)
    assert parse_scores("json:loads,msp,gen") == ("msp", "gen", "json:loads")
    with pytest.raises(UserError, match="did you mean 'mahalanobis'"):
        parse_scores("msp,mahalonobis")


# ---- errors


@pytest.mark.parametrize(
    "detector",
    [Mahalanobis(), KNN(), ClassMixtures(), *(make(Head(torch.eye(3), 1.0)) for make in (ReAct, ViM, GDA, COOkeD))],
    ids=lambda detector: type(detector).__name__,
)
def test_unfitted_use_is_a_typed_error(detector: FittedDetector) -> None:
    with pytest.raises(NotFitted, match=r"call fit\(features, labels\)"):
        detector.score(torch.eye(3))


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), r"floats \[N, D\]"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), r"labels must be whole numbers \[3\]"),
        (torch.ones(3, 2), torch.zeros(3), "whole numbers"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.int64), "no image"),
        (torch.full((2, 2), math.nan), torch.zeros(2, dtype=torch.int64), "NaN"),
        (torch.ones(2, 2), torch.tensor([0, -1]), "unknown classes"),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), "do not vary"),
    ],
)
def test_nothing_can_be_learnt_from_these(features: Tensor, labels: Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mahalanobis().fit_features(features, labels)


def test_settings_that_make_no_sense(clouds: Clouds) -> None:
    for wrong in (
        lambda: Head(torch.eye(3)[:1], 1.0),
        lambda: Head(torch.eye(3), 0.0),
        lambda: MCM(clouds.head, 0.0),
        lambda: Energy(clouds.head, -1.0),
        lambda: DeltaEnergy(clouds.head, 0),
        lambda: DeltaEnergy(clouds.head, reset="both"),  # type: ignore[arg-type]
        lambda: SDIS(torch.eye(3), torch.zeros(0, 3)),
        lambda: SDIS(torch.eye(3), torch.eye(3), -1.0),
        lambda: NegLabel(clouds.head, clouds.words, n_groups=31),
        lambda: KNN(0),
        lambda: KNN(500).fit_features(clouds.fit, clouds.labels),
        lambda: ReAct(clouds.head, 100.0),
        lambda: ViM(clouds.head, DIM).fit_features(clouds.fit, clouds.labels),
        lambda: ClassMixtures(0),
        lambda: Mahalanobis("shrunk").fit_features(clouds.fit, clouds.labels),  # type: ignore[arg-type]
        lambda: fit_probe(clouds.fit, clouds.labels, 3),
        lambda: mine_negatives(clouds.words, clouds.head.class_embeddings, share=0.0),
        lambda: MaxLogit(clouds.head).score(torch.eye(3)),
    ):
        with pytest.raises(UserError):
            wrong()


def test_the_gda_classifier_wants_every_class(clouds: Clouds) -> None:
    seen = clouds.labels != 2
    detector = GDA(clouds.head).fit_features(clouds.fit[seen], clouds.labels[seen])
    assert detector.score(clouds.known).isfinite().all()
    with pytest.raises(UserError, match="4 of 5 classes"):
        detector.logits(clouds.known)
