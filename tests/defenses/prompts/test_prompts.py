"""Prompt tuning: contexts enter where they should, losses mean what they say, and only the context learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from tuned_classes import CLASSES

from robustvlm.commands.immunize.images import encode_calibration
from robustvlm.data import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.defenses.prompt_towers import prompt_tokens, text_tower, token_embedding, word_vectors
from robustvlm.defenses.prompts import (
    PromptLearner,
    TuneSettings,
    bounded_energy_change,
    choose_shots,
    encode_source,
    masked,
    tune,
    tuning_loss,
)
from robustvlm.defenses.smoothing import smooth
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.settings import Observer


def learner_of(vlm: VLM, length: int = 4, start: str = "a picture of a", seed: int = 0) -> PromptLearner:
    return PromptLearner(vlm, CLASSES, length=length, start=start, seed=seed)


def test_a_context_of_words_is_the_prompt_of_these_words(tiny: VLM) -> None:
    with torch.no_grad():
        ours = learner_of(tiny)()
    theirs = tiny.encode_text([f"a picture of a {name}." for name in CLASSES])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_context_is_filled_up_in_front_by_a_seeded_draw(tiny: VLM) -> None:
    words = word_vectors(text_tower(tiny), "a picture of a")
    longer = learner_of(tiny, 6, seed=1).context.detach()
    torch.testing.assert_close(longer[2:], words)
    assert torch.equal(longer, learner_of(tiny, 6, seed=1).context)
    assert not torch.equal(longer[:2], learner_of(tiny, 6, seed=2).context[:2])
    torch.testing.assert_close(learner_of(tiny, 2).context.detach(), words[-2:])


def test_gradients_reach_the_context_and_nothing_else(tiny: VLM) -> None:
    learner = learner_of(tiny)
    learner().sum().backward()
    assert learner.context.grad is not None
    assert learner.context.grad.abs().sum() > 0
    assert all(p.grad is None for p in tiny.parameters())
    assert [name for name, _ in learner.named_parameters()] == ["context"]
    assert not token_embedding(text_tower(tiny))._forward_hooks


def test_many_classes_are_encoded_in_parts_with_the_same_gradient(tiny: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = learner_of(tiny), learner_of(tiny)
    direction = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
    (whole() * direction).sum().backward()
    monkeypatch.setattr("robustvlm.defenses.prompts._ROWS", 3)
    (parts() * direction).sum().backward()
    assert whole.context.grad is not None
    assert parts.context.grad is not None
    torch.testing.assert_close(whole.context.grad, parts.context.grad, atol=1e-5, rtol=1e-4)


def test_the_text_tower_is_found_behind_wrappers_and_only_there(tiny: VLM) -> None:
    assert text_tower(smooth(tiny, 0.1)) is tiny

    class Other(VLM):
        def _image_features(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

        def _text_features(self, texts: list[str]) -> Tensor:
            return torch.eye(3)[: len(texts)]

    other = Other(spec="other", image_size=4, logit_scale=10.0)
    with pytest.raises(UserError, match="whose token embeddings can be reached; 'other' is none"):
        text_tower(other)


def test_too_long_a_context_is_refused(tiny: VLM) -> None:
    with pytest.raises(UserError, match="30 context vectors do not fit into the 24 tokens of 'tiny'"):
        prompt_tokens(text_tower(tiny), CLASSES, 30)


def test_a_context_that_would_cut_class_names_off_is_refused(tiny: VLM) -> None:
    """Behind 22 placeholders no name was read at all, and all classes were one."""
    for length in (20, 22):
        wrong = (
            f"{length} context vectors do not fit .* with 'hot dog' behind them they make {length + 5}; pass context=19"
        )
        with pytest.raises(UserError, match=wrong):
            learner_of(tiny, length)
    assert learner_of(tiny, 19).count == 4
    with pytest.raises(UserError, match=r"tokens of 'tiny': with 'dog dog .* shorten the name"):
        prompt_tokens(text_tower(tiny), [" ".join(["dog"] * 30)], 4)


def test_a_class_name_that_looks_like_the_placeholder_is_no_trouble(tiny: VLM) -> None:
    _, first = prompt_tokens(text_tower(tiny), ["x x x", "x"], 3)
    assert first.tolist() == [1, 1]


@given(st.integers(0, 10_000))
def test_masking_never_lowers_the_nearest_class_and_ends_aligned(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(5, 7, generator=draw), dim=-1)
    features = F.normalize(torch.randn(6, 7, generator=draw), dim=-1)
    cosines, kept = features @ texts.T, masked(features, texts)
    top = cosines.argmax(dim=1)
    assert (kept * texts[top] >= 0).all()
    assert ((kept == 0) | (kept == features)).all()
    rows = torch.arange(6)
    assert ((kept @ texts.T)[rows, top] >= cosines[rows, top] - 1e-6).all()


@given(st.integers(0, 10_000), st.floats(1, 100))
def test_the_energy_change_is_bounded_and_has_the_sign_of_the_change(seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    whole, other = (scale * (2 * torch.rand(4, 3, generator=draw) - 1) for _ in range(2))
    change = bounded_energy_change(whole, other, scale)
    energies = -whole.logsumexp(1), -other.logsumexp(1)
    assert (change.abs() < 1).all()
    torch.testing.assert_close(change, torch.tanh((energies[1] - energies[0]) / scale), atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_sum_of_its_terms(images: tuple[Tensor, Tensor], tiny: VLM) -> None:
    features, labels = images
    texts = tiny.encode_text(list(CLASSES))
    terms = tuning_loss(features, labels, texts, scale=20.0, weight=2.5)
    expected = terms["cross_entropy"] + terms["masked_cross_entropy"] - 2.5 * terms["energy_change"]
    torch.testing.assert_close(terms["loss"], expected)
    plain = F.cross_entropy(20.0 * features @ texts.T, labels)
    torch.testing.assert_close(terms["cross_entropy"], plain)
    torch.testing.assert_close(tuning_loss(features, labels, texts, scale=20.0, weight=None)["loss"], plain)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_tuning_learns_and_is_reproducible(images: tuple[Tensor, Tensor], tiny: VLM, weight: float | None) -> None:
    features, labels = images
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    settings = TuneSettings(epochs=4, batch_size=12, lr=0.03, weight=weight)
    learners = [learner_of(tiny), learner_of(tiny)]
    histories = [tune(one, features, labels, scale=tiny.logit_scale, settings=settings) for one in learners]
    assert histories[0] == histories[1]
    assert torch.equal(learners[0].context, learners[1].context)
    assert histories[0][-1]["loss"] < 0.8 * histories[0][0]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_settings_out_of_range_and_diverged_losses_are_user_errors(images: tuple[Tensor, Tensor], tiny: VLM) -> None:
    for wrong, message in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "learning rate must be positive, got 0"),
        ({"lr": float("nan")}, "learning rate must be positive, got nan"),
        ({"weight": -1.0}, "weight of the energy term must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            TuneSettings(**wrong)  # type: ignore[arg-type]
    features, labels = images
    settings = TuneSettings(epochs=1)
    with pytest.raises(UserError, match="the loss is nan in epoch 1: pass a smaller --lr"):
        tune(learner_of(tiny), features * float("nan"), labels, scale=10.0, settings=settings)


class Dots(DataSource):
    """Nine images of three classes, three of each and none of a fourth, and one of an unknown class."""

    def __init__(self, order: int = 1, unreadable: bool = False) -> None:
        super().__init__("dots", ["a", "b", "c", "without"])
        self.order, self.unreadable = order, unreadable

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for i in range(10)[:: self.order]:
            if keep(f"dot {i}") and self.unreadable:
                yield Unreadable(f"dot {i}", "broken")
            elif keep(f"dot {i}"):
                yield Sample(f"dot {i}", Image.new("RGB", (2, 2)), i % 3 if i < 9 else UNKNOWN)


def test_shots_are_chosen_by_seed_and_id_alone() -> None:
    few, more = (set(choose_shots(Dots(), shots, 0)) for shots in (1, 2))
    assert sorted(int(name.split()[1]) % 3 for name in few) == [0, 1, 2]
    assert few < more
    assert set(choose_shots(Dots(order=-1), 1, 0)) == few
    assert len({tuple(choose_shots(Dots(), 1, seed)) for seed in range(9)}) > 1
    assert sorted(choose_shots(Dots(), None, 0)) == [f"dot {i}" for i in range(9)]
    with pytest.raises(UserError, match="'dots' has no readable image of a known class"):
        choose_shots(Dots(unreadable=True), 1, 0)


def test_features_do_not_depend_on_the_batch_size(tiny: VLM) -> None:
    one, many = (encode_source(tiny, Dots(), keep=lambda name: name != "dot 3", batch_size=n) for n in (1, 4))
    torch.testing.assert_close(one.features, many.features, atol=1e-5, rtol=0)
    assert one.ids == many.ids == one.groups
    assert one.labels.tolist() == [0, 1, 2, 1, 2, 0, 1, 2, -1]
    with pytest.raises(UserError, match="'dots' has no image that can be read"):
        encode_source(tiny, Dots(unreadable=True))


def test_a_random_encoder_gives_the_same_features_again(tiny: VLM) -> None:
    noisy = smooth(tiny, 0.5, n0=2)
    first = encode_source(noisy, Dots(), batch_size=4)
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(encode_source(noisy, Dots(), batch_size=4).features, first.features)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(encode_source(noisy, Dots(), batch_size=4, seed=1).features, first.features)
    assert len({tuple(row) for row in first.features.tolist()}) == 10  # black images all, and other noise for each


def test_images_of_immunize_are_drawn_by_the_seed_of_their_run(tiny: VLM, tmp_path: Path) -> None:
    def encoded(seed: int, folder: str) -> torch.Tensor:
        owner: Manifest = {"format": 1, "kind": "immunize", "id": "1f", "config": {"seed": seed}}
        (tmp_path / folder).mkdir()
        noisy = smooth(tiny, 0.5, n0=2)
        return encode_calibration(noisy, Dots(), tmp_path / folder, Observer(), owner=owner).features

    first, again, other = encoded(1, "first"), encoded(1, "again"), encoded(2, "other")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_of_transformers_text_is_told_from_one_without_embeddings() -> None:
    clip = text_tower(load_model("tiny"))
    del clip.model.token_embedding
    with pytest.raises(UserError, match="the text tower of 'tiny' has no token embedding that can be reached"):
        token_embedding(clip)
