"""Which antibodies are kept: bands, names, repeats; and what the diagnostics say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.data.names import words_of
from robustvlm.defenses.immunity.antibodies import (
    Antibodies,
    AntibodyText,
    Band,
    Proposal,
    automatic_band,
    coverage,
    filter_antibodies,
    margins,
    noise_antibodies,
)
from robustvlm.defenses.immunity.antibodies.coverage import nearest_angles
from robustvlm.defenses.immunity.antibodies.texts import KnownNames
from robustvlm.errors import UserError

CLASSES = ("dog", "police car", "apple", "glasses")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Dog", "the name of 'dog'"),
        ("the dogs", "the name of 'dog'"),
        ("police-cars", "the name of 'police car'"),
        ("sausage dog", "a kind of 'dog'"),
        ("dog in a box", "a kind of 'dog'"),
        ("bowl of apples", "a kind of 'apple'"),
        ("car", "'police car' is a kind of it"),
        ("hound", "another name of 'dog'"),
        ("Vehicles", "the superclass 'vehicle'"),
        ("...", "no word in it"),
        ("dog house", None),
        ("dogma", None),
        ("seahorse", None),
        ("apple pie", None),
        ("police", None),
        ("glass of milk", None),
        ("wolf", None),
    ],
)
def test_names_of_known_classes_are_told_from_others(text: str, reason: str | None) -> None:
    found = KnownNames(CLASSES, {"dog": ("hound", "puppy")}, ["vehicle"]).clash(text)
    assert found is None if reason is None else reason in (found or "")


@given(st.lists(st.sampled_from(["red", "Fish", "box", "berry", "bus", "wolf", "tooth"]), min_size=1, max_size=4))
def test_plurals_case_and_articles_make_no_difference(parts: list[str]) -> None:
    plural = {"Fish": "Fishes", "box": "boxes", "berry": "berries", "bus": "buses", "wolf": "wolves", "tooth": "teeth"}
    words = " ".join(parts)
    changed = "The " + "-".join([*parts[:-1], plural.get(parts[-1], parts[-1] + "s")]).upper()
    assert words_of(words) == words_of(changed)


def unit(*rows: Sequence[float]) -> Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def embedder(vectors: dict[str, Sequence[float]], asked: list[str] | None = None):  # type: ignore[no-untyped-def]
    def embed(texts: Sequence[str]) -> Tensor:
        if asked is not None:
            asked.extend(texts)
        return unit(*(vectors[text] for text in texts))

    return embed


def test_every_reason_to_drop_is_given_and_names_are_never_embedded() -> None:
    prototypes = unit([1, 0, 0], [0, 1, 0])
    vectors = {"wolf": (0.6, 0.1, 1), "cup": (0, 0, 1), "too near": (9, 0, 1), "near the other": (1, 3, 1)}
    texts = [AntibodyText(text, "dog") for text in ("wolf", "puppy", "big dog", *vectors)]
    texts.append(AntibodyText("wolves", "apple"))  # said twice: the nearer class keeps it
    texts.append(AntibodyText("dog in space", "dog", "context"))
    vectors |= {"dog in space": (0.7, 0, 1)}
    asked: list[str] = []
    found = filter_antibodies(
        Proposal(tuple(texts), {"dog": ("puppy",)}),
        embedder(vectors, asked),
        prototypes,
        ["dog", "apple"],
        band=Band(0.2, 0.8),
    )
    assert [(text.text, text.of_class) for text in found.kept.texts] == [("wolf", "dog"), ("dog in space", "dog")]
    torch.testing.assert_close(found.kept.embeddings, unit(vectors["wolf"], vectors["dog in space"]))
    reasons = {drop.antibody.text: drop.reason for drop in found.dropped}
    assert set(reasons) == {"puppy", "big dog", "cup", "too near", "near the other"}
    assert reasons["near the other"].startswith("too near to 'apple': cosine 0.905")
    assert reasons["cup"].startswith("too far from 'dog'")
    assert "puppy" not in asked
    assert "wolves" not in asked


@given(st.integers(0, 10_000), st.floats(-0.9, 0.4), st.floats(0.45, 0.99))
def test_kept_antibodies_obey_the_rule_for_every_class(seed: int, safe: float, risk: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    prototypes = F.normalize(torch.randn(4, 2, 3, generator=draw), dim=-1)  # two prototypes a class
    rows = F.normalize(torch.randn(12, 3, generator=draw), dim=-1)
    texts = tuple(AntibodyText(f"text {i} here", CLASSES[i % 4]) for i in range(12))
    found = filter_antibodies(
        Proposal(texts),
        lambda asked: rows[[int(text.split()[1]) for text in asked]],
        prototypes,
        CLASSES,
        band=Band(safe, risk),
    )
    kept = {text.text for text in found.kept.texts}
    assert len(kept) + len(found.dropped) == 12
    for i, text in enumerate(texts):
        cosines = (rows[i] * prototypes).sum(dim=-1).amax(dim=1)
        assert (text.text in kept) == bool(cosines[i % 4] > safe and (cosines < risk).all())


def test_nothing_to_keep_is_no_error() -> None:
    found = filter_antibodies(
        Proposal((AntibodyText("dogs", "dog"),)), embedder({}), torch.eye(2), ["dog", "cat"], band=Band(0, 1)
    )
    assert len(found.kept) == 0
    assert found.kept.embeddings.shape == (0, 2)
    assert margins(found.kept, torch.eye(2)).tolist() == [2.0, 2.0]
    assert nearest_angles(found.kept, torch.eye(2)).tolist() == [180.0, 180.0]


def test_texts_for_unknown_classes_are_an_error() -> None:
    with pytest.raises(UserError, match="is for 'fox', which is none of the known classes"):
        filter_antibodies(
            Proposal((AntibodyText("wolf", "fox"),)), embedder({}), torch.eye(2), CLASSES, band=Band(0, 1)
        )


def test_the_automatic_band_is_read_off_the_other_classes() -> None:
    # Cosines between different classes, by construction: 0 for all pairs but one of 0.6.
    texts = unit([1, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    band = automatic_band(texts, texts)
    assert band.safe == pytest.approx(0.0, abs=1e-6)
    assert band.risk == pytest.approx(0.6, abs=1e-6)
    assert automatic_band(texts, texts, safe=0.1, risk=0.5) == Band(0.1, 0.5)
    # Of several prototypes the nearest counts.
    both = torch.stack([texts, -texts], dim=1)
    assert automatic_band(both, texts).risk == pytest.approx(0.6, abs=1e-6)


def test_a_space_without_a_band_says_so() -> None:
    with pytest.raises(UserError, match=r"no band of antibodies between .* pass both bounds yourself"):
        automatic_band(torch.eye(3), unit([0, 1, 0], [0, 0, 1], [1, 0, 0]))
    for safe, risk in ((0.5, 0.5), (0.6, 0.5), (-2.0, 0.5), (0.1, float("nan"))):
        with pytest.raises(UserError, match="the band of antibodies needs"):
            Band(safe, risk)


def test_coverage_and_margins_by_hand() -> None:
    two = Antibodies((AntibodyText("a", "x"), AntibodyText("b", "x")), unit([1, 0], [1, 1]))
    assert nearest_angles(two, unit([0, 1], [1, 0])).tolist() == pytest.approx([45.0, 0.0], abs=0.05)
    assert coverage(two, unit([0, 1], [1, 0]), 44.0).tolist() == [False, True]
    assert margins(two, unit([0, 1], [1, 0])).tolist() == pytest.approx([1 - 0.5**0.5, 0.0], abs=1e-6)
    with pytest.raises(UserError, match="between 0 and 180"):
        coverage(two, unit([0, 1]), -1.0)


def test_noise_is_uniform_seeded_and_far_from_everything() -> None:
    many = noise_antibodies(2000, 64, seed=3).embeddings
    assert torch.equal(many[:5], noise_antibodies(5, 64, seed=3).embeddings)
    assert not torch.equal(many[:5], noise_antibodies(5, 64, seed=4).embeddings)
    cosines = many[:, 0]
    # The bound of the paper, P(|cos| > eps) <= 2 exp(-D eps^2 / 2), and the exact variance 1 / D.
    assert (cosines.abs() > 0.4).float().mean() <= 2 * torch.exp(torch.tensor(-64 * 0.4**2 / 2))
    assert cosines.var().item() == pytest.approx(1 / 64, rel=0.15)
    assert noise_antibodies(0, 8, seed=0).embeddings.shape == (0, 8)
