"""Image encoders inside of language models: the library's own numbers, on random weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoTokenizer

from robustvlm.core.framing import to_pixels
from robustvlm.defenses.answering import Answering
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.mllm import MOST_WORDS, MllmVLM
from robustvlm.models.mllm.load import BUNDLED, split_question
from robustvlm.models.mllm.tongue import Options
from tests.models.test_transformers import pictures
from tests.models.transformers_folders import SIDE, make

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}USER {{ p['text'] }} ASSISTANT{% endif %}{% endfor %}{% endfor %}"
)


def opened(folder: Path, spec: str = "", **over: Any) -> tuple[Any, MllmVLM]:
    theirs = make(folder, "llava", **over)
    ours = load_model(f"mllm:{folder}{spec}")
    assert isinstance(ours, MllmVLM)
    return theirs, ours


def library_input(folder: Path, prompt: str, tokens: int) -> dict[str, torch.Tensor]:
    """Return what the library's own processor gives of three pictures and a prompt with one image token."""
    images = AutoImageProcessor.from_pretrained(folder)(images=pictures(), return_tensors="pt")["pixel_values"]
    text = prompt.replace("<image>", "<image>" * tokens)
    ids = AutoTokenizer.from_pretrained(folder)([text] * 3, return_tensors="pt")
    return {"pixel_values": images, "input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}


@pytest.mark.parametrize("over", [{}, {"siglip": True}, {"template": TEMPLATE}, {"vision_feature_layer": [-1, -2]}])
def test_logits_and_answers_are_those_of_the_library(over: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = opened(tmp_path / "m", "#Describe the picture.", **over)
    pixels = torch.stack([to_pixels(image, ours.framing) for image in pictures()])
    tokens = ours.tokens(pixels)
    assert tokens.shape[1] == len(ours.lengths) == 4  # the first token of CLIP is left out, SigLIP has none
    given = library_input(tmp_path / "m", ours.prompt.text, 4)
    assert (given["input_ids"] == 3).sum() == 12
    with torch.no_grad():
        wanted = theirs(**given).logits[:, -1]
        found = ours.next_logits(tokens, torch.zeros(3, 1, dtype=torch.long))[:, 0]
        said = theirs.generate(**given, do_sample=False, max_new_tokens=MOST_WORDS)[:, given["input_ids"].shape[1] :]
    assert (wanted - found).abs().max() < 1e-4
    ends = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert ours.say(tokens) == [" ".join(ends.decode(row, skip_special_tokens=True).split()) for row in said]
    # What the attacks look at, one answer read at once, agrees with what was made word by word.
    ids = ours.greedy(tokens)
    with torch.no_grad():
        top = ours.next_logits(tokens, ids).argmax(-1)
    assert torch.equal(top[ids >= 0], ids[ids >= 0])


def test_an_image_s_answer_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    tokens = ours.tokens(torch.rand(3, 3, SIDE, SIDE))
    ids = torch.tensor([[11, 12, 2, -1]]).repeat(3, 1)
    with torch.no_grad():
        together, alone = ours.next_logits(tokens, ids), ours.next_logits(tokens[1:2], ids[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    # Filling behind the end changes nothing before it.
    with torch.no_grad():
        longer = ours.next_logits(tokens, F.pad(ids, (0, 5), value=-1))
    assert torch.allclose(longer[:, :4], together, atol=1e-5)


def test_scores_of_options_are_those_of_each_answer_alone(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    answers = ["dog", "cat", "hot dog", "hot dog train", "hot apple", "red bike"]
    options = ours.options(answers)
    # Shared beginnings are one node, and ends are none, but where one answer begins another.
    assert len(options.ids) == 3
    tokens = ours.tokens(torch.rand(2, 3, SIDE, SIDE))
    with torch.no_grad():
        scores = ours.option_scores(tokens, options)
        for place, answer in enumerate(answers):
            ids = ours.tongue.answer_ids(ours.question, answer)
            row = torch.tensor([ids + ([2] if answer == "hot dog" else [])]).repeat(2, 1)
            alone = ours.next_logits(tokens, row).log_softmax(-1).gather(2, row[..., None]).sum((1, 2))
            assert torch.allclose(scores[:, place], alone, atol=1e-4)
    assert (scores.exp().sum(1) < 1).all()


def test_an_answer_that_begins_another_ends_by_any_end(tmp_path: Path) -> None:
    logits = torch.full((1, 2, 10), -8.0)
    logits[0, 0, 5] = logits[0, 1, 7] = 8.0  # says 5, and then ends by its second end
    logits[0, 1, 6] = -4.0
    scores = Options.of([[5], [5, 6]], ends=(1, 7)).gather(logits)
    known = logits.log_softmax(-1)
    assert scores[0, 0] == known[0, 0, 5] + known[0, 1, [1, 7]].logsumexp(0)
    assert scores[0, 1] == known[0, 0, 5] + known[0, 1, 6]
    assert scores.argmax() == 0
    _, ours = opened(tmp_path / "m")
    names, before = ["hot", "hot dog"], Answering(ours, ["hot", "hot dog"]).fingerprint
    ours.tongue = replace(ours.tongue, ends=(*ours.tongue.ends, 5, *ours.tongue.ends))
    assert ours.options(names).ends == (2, 5)
    assert Answering(ours, names).fingerprint != before, "its answers are others"


def test_options_that_are_the_same_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="same tokens"):
        Options.of([[1], [1]], ends=(2,))


def test_gradients_reach_the_pixels_through_the_language_model(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    pixels = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    ours.option_scores(ours.tokens(pixels), ours.options(["dog", "cat"]))[:, 0].sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(not weight.requires_grad and weight.grad is None for weight in ours.parameters())


def test_features_are_all_tokens_at_unit_length(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    pixels = torch.rand(4, 3, SIDE, SIDE)
    features, tokens = ours.encode_image(pixels), F.normalize(ours.tokens(pixels), dim=-1)
    assert torch.allclose(
        features[:2] @ features[2:].T, torch.einsum("itd,jtd->ij", tokens[:2], tokens[2:]) / 4, atol=1e-5
    )
    again = ours.tokens_of(features)
    assert torch.allclose(again.norm(dim=-1), ours.lengths.expand(4, -1), atol=1e-4)
    assert torch.allclose(F.normalize(again, dim=-1), tokens, atol=1e-5)


def test_pooled_features_are_the_mean_token_and_answer_nothing(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m", "@pooled")
    pixels = torch.rand(2, 3, SIDE, SIDE)
    wanted = F.normalize(F.normalize(ours.tokens(pixels), dim=-1).mean(1), dim=-1)
    assert torch.allclose(ours.encode_image(pixels), wanted, atol=1e-6)
    with pytest.raises(UserError, match="leave out @pooled"):
        ours.tokens_of(wanted)
    with pytest.raises(UserError, match="no text encoder"):
        ours.encode_text(["a cat"])


def test_the_fingerprint_covers_the_question_and_the_language_model(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    assert ours.fingerprint != ours.asking("Describe the picture.").fingerprint
    assert ours.fingerprint == ours.asking(ours.question).fingerprint
    before = ours.fingerprint
    with torch.no_grad():
        ours.model.lm_head.weight[0, 0] += 1
    assert ours.fingerprint != before


def test_specs() -> None:
    assert split_question("mllm:org/llava#Is it a dog?") == ("org/llava", "Is it a dog?", False)
    assert split_question("mllm:org/llava@pooled") == ("org/llava", "", True)
    with pytest.raises(UserError, match="asks nothing"):
        split_question("mllm:tiny#")


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: _edit(m / "config.json", model_type="qwen3_vl"), "takes llava"),
        (lambda m: _edit(m / "config.json", vision_config={"model_type": "pixtral"}), "image tower"),
        (lambda m: (m / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda m: (m / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), "chat template"),
        (lambda m: (m / "chat_template.jinja").write_text("USER: what?"), "0 image tokens"),
    ],
)
def test_broken_folders_are_refused_in_one_line(spoil: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "m", "llava")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=said) as found:
        load_model(f"mllm:{tmp_path / 'm'}")
    assert "\n" not in str(found.value)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path / "m", "llava")
    state = load_file(tmp_path / "m" / "model.safetensors")
    lost = next(name for name in state if "multi_modal_projector" in name)
    del state[lost]
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="would be random"):
        load_model(f"mllm:{tmp_path / 'm'}")


@pytest.mark.parametrize("base", ["evil_module:make", "/some/folder", ["tiny"], None, "hf-hub:org/name"])
def test_the_tower_that_a_config_names_is_a_bundled_one(
    base: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('code of a file was run')")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(BUNDLED["tiny"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["vision_config"]["base"] = base
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"takes its image tower from .*: expected a bundled model, tiny"):
        load_model(f"mllm:{tmp_path / 'm'}")


def test_values_of_another_form_are_one_line(tmp_path: Path) -> None:
    make(tmp_path / "m", "llava", vision_feature_layer=-2)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vision_feature_layer": "last"}))
    with pytest.raises(UserError, match="has a value of another form"):
        load_model(f"mllm:{tmp_path / 'm'}")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "generation_config.json").write_text("[2]")
    with pytest.raises(UserError, match=r"cannot be loaded|holds a list, expected an object"):
        load_model(f"mllm:{tmp_path / 'm'}")


def test_an_end_that_the_model_cannot_say_ends_nothing(tmp_path: Path) -> None:
    _, ours = opened(tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | {"eos_token_id": [2, 10**6]}))
    again = load_model(f"mllm:{tmp_path / 'm'}")
    assert isinstance(again, MllmVLM)
    assert again.tongue.ends == ours.tongue.ends == (2,)
    path.write_text(json.dumps(told | {"eos_token_id": [10**6]}))
    with pytest.raises(UserError, match="can say none of the tokens that end an answer: 1000000"):
        load_model(f"mllm:{tmp_path / 'm'}")
