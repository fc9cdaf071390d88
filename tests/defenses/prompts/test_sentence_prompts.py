"""Prompts of an encoder of one's own that reads its texts with a sentence encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sentence_encoders import Closed, Own, Without
from torch import nn

from robustvlm.defenses.prompt_towers import context_in_place
from robustvlm.defenses.prompts import PromptLearner, TuneSettings, tune
from robustvlm.defenses.smoothing import smooth
from robustvlm.errors import UserError
from robustvlm.models.custom import CustomVLM, wrap_encoder

CLASSES = ("violin", "hot dog", "apple", "a picture of a guitar")


def wrapped(make: Callable[[], nn.Module] = Own) -> CustomVLM:
    return wrap_encoder(make(), "own", torch.device("cpu"))


def learner_of(vlm: CustomVLM, length: int = 4) -> PromptLearner:
    return PromptLearner(vlm, CLASSES, length=length, start="a picture of a", seed=0)


def test_a_context_of_words_is_the_prompt_of_these_words() -> None:
    # Texts of other lengths are encoded in another order, and with padding.
    vlm = wrapped()
    with torch.no_grad():
        torch.testing.assert_close(learner_of(vlm)(), vlm.encode_text([f"a picture of a {name}." for name in CLASSES]))


def test_the_context_stands_where_the_placeholders_stood() -> None:
    # A context that repeats the placeholder's own embedding changes nothing, and only then.
    vlm = wrapped()
    plain = vlm.encode_text([f"x x x x {name}." for name in CLASSES])
    learner = learner_of(vlm)
    with torch.no_grad():
        learner.context[:] = vlm.encoder.words.tokens.weight[4]
        torch.testing.assert_close(learner(), plain)
        learner.context[2, 3] += 1
        assert ((learner() - plain).norm(dim=1) > 1e-3).all()


def test_a_text_without_placeholders_stays_as_it_is() -> None:
    embedding, context, x = nn.Embedding(6, 3), torch.ones(2, 3), 4
    ids = torch.tensor([[1, x, x, 2], [1, 2, x, 3]])

    plain = embedding(ids)
    with context_in_place(embedding, context, lambda _: torch.tensor([1, -1])):
        found = embedding(ids)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[0, 1:3], context)
    assert torch.equal(found[0, [0, 3]], plain[0, [0, 3]])


class Reference(Own):
    """Sends a text of its own through the sentence encoder, before all others."""

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return super().encode_text(texts) - super().encode_text(["guitar"])


def test_a_reference_text_of_the_encoder_is_not_overwritten() -> None:
    vlm = wrapped(Reference)
    with torch.no_grad():
        torch.testing.assert_close(learner_of(vlm)(), vlm.encode_text([f"a picture of a {name}." for name in CLASSES]))


@pytest.mark.parametrize("rows", [2, 128])
def test_gradients_reach_the_context_and_nothing_else(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.defenses.prompts._ROWS", rows)
    vlm = wrapped()
    learner, step = learner_of(vlm), 1e-2
    direction = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    (learner() * direction).sum().backward()
    assert learner.context.grad is not None
    assert all(p.grad is None for p in vlm.parameters())
    assert not vlm.encoder.words.tokens._forward_hooks
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            learner.context[1, 3] += sign * step
            values.append(float((learner() * direction).sum()))
            learner.context[1, 3] -= sign * step
    assert float(learner.context.grad[1, 3]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-3)


def test_tuning_learns_what_other_words_say() -> None:
    vlm = wrapped()
    features, labels = vlm.encode_text([f"dog dog dog dog {name}." for name in CLASSES]).detach(), torch.arange(4)
    settings = TuneSettings(epochs=30, lr=0.05, weight=None)
    history = tune(learner_of(vlm), features, labels, scale=100.0, settings=settings)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_what_cannot_be_reached_or_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="encode_text must pass every text through its SentenceEncoder"):
        learner_of(wrapped(Closed))
    with pytest.raises(UserError, match=r"encoders with one SentenceEncoder, .* can be reached; 'own' is none"):
        learner_of(wrapped(Without))
    with pytest.raises(
        UserError, match=r"252 context .* the 256 tokens of 'own': with 'a pict.* 260; pass context=248"
    ):
        learner_of(wrapped(), 252)
    vlm = wrapped()
    assert learner_of(vlm, 248).count == len(CLASSES)
    assert len(vlm.encoder.words.tokenizer.encode("a " * 300).ids) == 256  # it goes on cutting


def test_it_is_found_behind_wrappers() -> None:
    vlm = wrapped()
    learner = PromptLearner(smooth(vlm, 0.1), CLASSES, length=4, start="a picture of a", seed=0)
    with torch.no_grad():
        torch.testing.assert_close(learner(), learner_of(vlm)())
