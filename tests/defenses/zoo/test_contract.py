"""What every test-time defence keeps, whichever it is: all of this runs over the one table of defences."""

from __future__ import annotations

import pytest
import torch
from defended_small import Small, classifier, images
from torch import Tensor

from robustvlm.certify.threats import read_noise
from robustvlm.commands.certify.encoder import NoisyEncoder, probe_encoder
from robustvlm.commands.detect.encoding import Answers
from robustvlm.defenses import load_classifier, load_pipeline
from robustvlm.defenses.pipeline import apply_operations, operators
from robustvlm.defenses.specs import split_spec, undefended
from robustvlm.defenses.zoo.base import DEFENCES, MODES, AnswerDefence, form_of, generators, read_defence, strengths
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.views import features_of
from robustvlm.defenses.zoo.wrap import counted_passes, gradient_mode, modes_of
from robustvlm.errors import UserError

ALL = list(DEFENCES)
WRITTEN = {name: str(kind()) if kind.explicit else name for name, kind in DEFENCES.items()}
"""Each as it is written, with its constants where it asks for them."""


def asked(name: str, x: Tensor, seed: int = 0) -> Tensor:
    model = classifier(WRITTEN[name])
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", ALL)
def test_strength_zero_is_the_undefended_model_to_the_bit(name: str) -> None:
    off = classifier(f"{name}:{DEFENCES[name].off}")
    x = images()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(off(x), classifier()(x))


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_answered_alone_as_in_any_batch_and_order(name: str) -> None:
    x = images(5)
    whole = asked(name, x)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(asked(name, x[order]), whole[order], atol=2e-4)
    for row in range(5):
        assert torch.allclose(asked(name, x[row : row + 1]), whole[row : row + 1], atol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_draws_follow_from_the_seed_and_are_declared(name: str) -> None:
    x = images()
    first = asked(name, x)
    assert torch.equal(asked(name, x), first)
    others = [asked(name, x, seed) for seed in (1, 2, 3, 4)]
    assert all(torch.equal(other, first) for other in others) != DEFENCES[name].random


@pytest.mark.parametrize("name", ALL)
def test_modes_change_gradients_and_never_an_answer(name: str) -> None:
    model, x = classifier(WRITTEN[name]), images()
    assert modes_of(model) == DEFENCES[name].modes
    assert set(modes_of(model)) <= set(MODES)
    found = asked(name, x)
    for mode in modes_of(model):
        given = x.clone().requires_grad_()
        torch.manual_seed(0)
        with gradient_mode(model, mode):
            output = model(given)
        assert torch.equal(output.detach(), found), mode
        output.logsumexp(1).sum().backward()
        assert given.grad is not None
        assert given.grad.isfinite().all()
        assert given.grad.abs().amax() > 0, mode
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("outer", ["csr:threshold=1.1", "ttc:tau=9", "et3", "antiadv", "ttp:views=4:tau=1.1"])
@pytest.mark.parametrize("inner", ["csr:threshold=1.1", "jpeg:50", "clipure"])  # of one that draws, other draws come
def test_modes_of_a_model_do_not_change_the_steps_of_a_defence_in_front_of_it(inner: str, outer: str) -> None:
    """A loop takes gradients of what it stands on: those are that model's own, not what an attack takes them for."""
    model, x = classifier(inner, outer), images(3)

    def answer(grad: bool) -> Tensor:
        torch.manual_seed(0)
        given = x.clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            return model(given).detach()

    found = answer(False)
    for mode in modes_of(model):
        with gradient_mode(model, mode):
            assert torch.equal(answer(False), found), mode
            assert torch.equal(answer(True), found), mode


@pytest.mark.parametrize("inner", ["csr:threshold=1.1", "ttc:tau=9"])
def test_gradients_through_views_made_in_parts_are_those_of_all_at_once(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = classifier(inner, "tte:4"), images(3)

    def gradient() -> Tensor:
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(given).square().sum(), given)
        return found

    for mode in modes_of(model):
        with gradient_mode(model, mode):
            whole = gradient() if "ttc" not in inner else None  # one that draws draws once for each part
            monkeypatch.setitem(features_of.__kwdefaults__, "rows_per_pass", 6)
            parts = gradient()
            monkeypatch.undo()
            assert parts.isfinite().all()
            if whole is not None:
                torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["csr:threshold=1.1", "ttc:tau=9"])
def test_gate_off_looks_past_an_open_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the pull, its gradient is that of the undefended model where the gate, if shut, had answered."""
    monkeypatch.setattr(Steering, "lower", lambda *_: None)
    model, x = classifier(name), images(3)
    torch.manual_seed(0)
    given = x.clone().requires_grad_()
    with gradient_mode(model, "gate:off"):
        (found,) = torch.autograd.grad(model(given)[:, 0].sum(), given)
    torch.manual_seed(0)
    noise = torch.stack([2 * torch.rand(x.shape[1:], generator=draws) - 1 for draws in generators(x)])
    seen = (x if name.startswith("csr") else (x + 4 / 255 * noise).clamp(0, 1)).requires_grad_()
    (plain,) = torch.autograd.grad(classifier()(seen)[:, 0].sum(), seen)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ALL)
def test_passes_are_those_declared(name: str) -> None:
    model, x = classifier(WRITTEN[name]), images(4)
    with counted_passes(model) as seen, torch.no_grad():
        for row in range(4):
            before = (seen.forward, seen.backward)
            model(x[row : row + 1])
            found = (seen.forward - before[0], seen.backward - before[1])
            declared = [DEFENCES[name]().cost(gate_open=gate) for gate in (True, False)]
            assert found in [(cost.forward, cost.backward) for cost in declared]


@pytest.mark.parametrize("name", ALL)
def test_pixels_given_are_not_changed_and_features_stay_of_unit_length(name: str) -> None:
    model, x = classifier(WRITTEN[name]), images()
    kept = x.clone()
    with torch.no_grad():
        model(x)
        if model.vlm is not None:
            assert torch.allclose(model.vlm.encode_image(x).norm(dim=1), torch.ones(len(x)), atol=1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ALL)
def test_detection_can_ask_about_it_and_certificates_refuse_it_or_say_that_it_draws(name: str) -> None:
    """Both ask without gradients, which loops of a defence need inside."""
    model, x = classifier(WRITTEN[name]), images(4)
    features, output = Answers(model, batch_size=4)(x)
    given = output if features is None else features
    assert given is not None
    assert bool(given.isfinite().all())
    if issubclass(DEFENCES[name], AnswerDefence):
        with pytest.raises(UserError, match="needs classes"):
            load_pipeline(f"tiny+{WRITTEN[name]}+smooth:0.25")
        return
    smoothed = apply_operations(Small(), split_spec(f"tiny+{WRITTEN[name]}+smooth:0.25")[1])
    found = probe_encoder(NoisyEncoder(smoothed), x, read_noise("0.25"), 8, model=name)
    assert found.random == DEFENCES[name].random
    assert [check.name for check in found.checks] == ["random encoder"] * DEFENCES[name].random


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_read_back(name: str) -> None:
    defence = DEFENCES[name]()
    again = str(defence).split(":")
    assert read_defence(again[0], tuple(again[1:])) == defence
    by_name = tuple(f"{known.name}={getattr(defence, known.name)}" for known in strengths(type(defence)))
    assert read_defence(name, by_name) == defence
    assert operators()[name].form == form_of(name)
    about = type(defence).about
    assert about.title
    assert about.reference
    assert about.summary


def test_an_answer_is_the_last_word_and_there_is_one() -> None:
    answers = [name for name in ALL if issubclass(DEFENCES[name], AnswerDefence)]
    for spec in (f"tiny+{answers[0]}+{answers[-1]}", f"tiny+{answers[0]}+bits:3", f"tiny+{answers[0]}+smooth:0.1"):
        with pytest.raises(UserError, match="gives logits, so that only"):
            load_classifier(spec, ["a", "b"], ["{}"])
    for name in answers:
        with pytest.raises(UserError, match="needs classes and gives logits"):
            load_pipeline(f"tiny+{name}")
    with pytest.raises(UserError, match="works on features already"):
        load_pipeline("tiny+clipure+clipure")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("bits:x", "levels must be a whole number, got 'x'"),
        ("bits:9", "levels must be 0 to 8, got 9"),
        ("bits:1:2", "must be written"),
        ("median:4", "kernel must be odd, got 4"),
        ("blur:kernel=3:kernel=5", "must be written"),
        ("blur:3:nan", "sigma must be 0.001 to 100, got nan"),
    ],
)
def test_wrong_words_end_in_one_line(written: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_pipeline(f"tiny+{written}")


def test_a_spec_without_its_defences() -> None:
    assert undefended("tiny") == "tiny"
    assert undefended("tiny+smooth:0.1:4+jpeg:75+smooth:0.2") == "tiny+smooth:0.1:4"


def test_draws_of_one_image_are_its_own() -> None:
    x = images(4)

    def first(given: Tensor) -> list[float]:
        torch.manual_seed(3)
        return [torch.rand((), generator=draws).item() for draws in generators(given)]

    whole = first(x)
    assert len(set(whole)) == 4
    assert first(x.flip(0)) == whole[::-1]
    assert first(x[2:3]) == whole[2:3]
