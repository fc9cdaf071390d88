"""Families of multimodal models besides LLaVA: the library's own numbers, and what is noticed if it is not so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from robustvlm.core.framing import to_pixels
from robustvlm.defenses import load_classifier
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.mllm import MOST_WORDS, MllmVLM
from robustvlm.models.mllm.families import Family, Gemma3, InternVL, Llava, PaliGemma
from robustvlm.models.mllm.load import ELSEWHERE, FAMILIES
from robustvlm.models.mllm.qwen import Qwen2VL
from tests.models.mllm_folders import OTHERS
from tests.models.transformers_folders import SIDE, lively

QUESTION = "what is it?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    place, made = tmp_path_factory.mktemp("families"), {}
    for kind, make in OTHERS.items():
        folder = place / kind
        folder.mkdir()
        model = lively(make(folder))
        model.save_pretrained(str(folder))
        made[kind] = folder, model
    return made


def opened(folder: Path) -> MllmVLM:
    found = load_model(f"mllm:{folder}#{QUESTION}")
    assert isinstance(found, MllmVLM)
    return found


def photographs(side: int) -> list[Image.Image]:
    draws = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (3, side, side, 3), generator=draws, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in levels]


@pytest.mark.parametrize("kind", OTHERS)
def test_logits_and_answers_are_those_of_the_library(kind: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, theirs = folders[kind]
    ours, images = opened(folder), photographs(SIDE)
    processor = AutoProcessor.from_pretrained(folder)
    asked = ours.tongue.chat(QUESTION)
    more = {"add_special_tokens": False} if ours.family.chats else {}
    given = processor(
        text=[asked] * 3, images=[[one] for one in images], return_tensors="pt", **more, **ours.family.settings
    )
    if not isinstance(ours.family, Qwen2VL):
        given.pop("mm_token_type_ids", None)
    given.pop("labels", None)
    tokens = ours.tokens(torch.stack([to_pixels(image, ours.framing) for image in images]))
    with torch.no_grad():
        wanted = theirs(**given).logits[:, -1]
        said = theirs.generate(**given, do_sample=False, max_new_tokens=MOST_WORDS)[:, given["input_ids"].shape[1] :]
        found = ours.next_logits(tokens, torch.zeros(3, 1, dtype=torch.long))[:, 0]
        assert (wanted - found).abs().max() < 1e-4
        assert ours.say(tokens) == [" ".join(processor.decode(row, skip_special_tokens=True).split()) for row in said]
        # What the attacks look at, one answer read at once, agrees with what was made word by word.
        ids = ours.greedy(tokens)
        top = ours.next_logits(tokens, ids).argmax(-1)
    assert torch.equal(top[ids >= 0], ids[ids >= 0])
    assert len({tuple(row) for row in wanted.tolist()}) == 3


@pytest.mark.parametrize("kind", OTHERS)
def test_names_are_scored_at_once_as_one_by_one(kind: str, folders: dict[str, tuple[Path, Any]]) -> None:
    ours = opened(folders[kind][0])
    answers = ["dog", "cat", "hot dog", "hot dog train", "red bike"]
    pixels = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    tokens = ours.tokens(pixels)
    scores = ours.option_scores(tokens, ours.options(answers))
    for place, answer in enumerate(answers):
        ids = ours.tongue.answer_ids(QUESTION, answer)
        row = torch.tensor([ids + ([2] if answer == "hot dog" else [])]).repeat(2, 1)
        alone = ours.next_logits(tokens, row).log_softmax(-1).gather(2, row[..., None]).sum((1, 2))
        assert torch.allclose(scores[:, place], alone, atol=1e-4)
    (grad,) = torch.autograd.grad(scores[:, 0].sum(), pixels)
    assert (grad.flatten(1).abs().amax(1) > 0).all()
    # Each image by itself.
    with torch.no_grad():
        assert torch.allclose(ours.option_scores(tokens[1:], ours.options(answers)), scores[1:], atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_they_are_encoders_and_smoothed_classifiers(kind: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = folders[kind]
    ours, pixels = opened(folder), torch.rand(3, 3, SIDE, SIDE)
    count, width = ours.shape
    assert ours.tokens(pixels).shape == (3, count, width)
    assert torch.allclose(ours.encode_image(pixels).norm(dim=-1), torch.ones(3), atol=1e-5)
    plain = load_classifier(f"mllm:{folder}", ["cat", "dog", "apple"], ["{}"])
    smoothed = load_classifier(f"mllm:{folder}+smooth:0.000001:2", ["cat", "dog", "apple"], ["{}"])
    with torch.no_grad():
        assert plain(pixels).shape == (3, 3)
        assert plain(pixels).exp().sum(1).max() < 1
        # Noise of nothing: the lengths of tokens alone are others, fixed for their places.
        kept = plain.speaker.tokens_of(plain.speaker.encode_image(pixels))
        names = plain.speaker.options(["cat", "dog", "apple"])
        assert torch.allclose(smoothed(pixels), plain.speaker.option_scores(kept, names), atol=1e-2)


def _causal(_: Any, before: int, image: int, after: int, further: int, device: torch.device) -> torch.Tensor:
    return Family.sees(Llava(), before, image, after, further, device)


PLANTED = {
    "gemma3 whose image does not see itself": ("gemma3", Gemma3, "sees", _causal, "other logits"),
    "paligemma without a prefix": ("paligemma", PaliGemma, "sees", _causal, "other logits"),
    "tokens in another order": (
        "gemma3",
        Gemma3,
        "tokens",
        lambda _, net, images: net.vision_tower(images).last_hidden_state.flip(1),
        "other logits",
    ),
    "an image without marks": ("internvl", InternVL, "write", lambda *given: given[-1], "processor of .* makes 10 tok"),
    "a grid that is not folded": (
        "internvl",
        InternVL,
        "of",
        classmethod(lambda *given: given[0]((-1,), True, 1.0)),
        "fails under",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_idea_of_a_family_is_noticed_when_a_model_is_opened(
    name: str, folders: dict[str, tuple[Path, Any]], monkeypatch: Any
) -> None:
    kind, family, part, planted, said = PLANTED[name]
    monkeypatch.setattr(family, part, planted)
    with pytest.raises(UserError, match=said) as found:
        opened(folders[kind][0])
    assert "\n" not in str(found.value)


def test_a_window_shorter_than_the_prompt_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    model = lively(OTHERS["gemma3"](folder, window=8))
    model.save_pretrained(str(folder))
    with pytest.raises(UserError, match="last 8 alone"):
        opened(folder)


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava_next", "smolvlm", "gemma4"])
def test_other_families_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    lively(OTHERS["gemma3"](folder)).save_pretrained(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    with pytest.raises(UserError, match="module:callable") as found:
        opened(folder)
    assert ELSEWHERE.get(kind, "gemma3") in str(found.value)
    assert not set(FAMILIES) & set(ELSEWHERE)


def test_no_chat_template_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    lively(OTHERS["internvl"](folder)).save_pretrained(str(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        opened(folder)
