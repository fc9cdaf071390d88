"""A model that answers in words as a classifier: by itself, smoothed, purified, counted; attacked and certified."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from robustvlm.__main__ import run as main
from robustvlm.commands.certify.audit import Effort, audit_folder
from robustvlm.core.framing import to_pixels
from robustvlm.defenses import SmoothedVLM, load_classifier, load_pipeline
from robustvlm.defenses.answering import Answering, AnswerVLM, answers_of, asking, image_tokens, speaker_of
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.purify.parts import Mapper, MapperShape, PurifiedVLM
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.defenses.votes import Smoothed, certify_tensors
from robustvlm.defenses.zoo.base import DEFENCES
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.models.mllm import MllmVLM
from tests.models.test_transformers import pictures
from tests.models.transformers_folders import SIDE, make

NAMES = ["cat", "dog", "apple", "hot dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava") / "m"
    make(place, "llava")
    return place


def classifier(folder: Path, more: str = "") -> Answering:
    found = classifier_of(folder, more)
    assert isinstance(found, Answering)
    return found


def classifier_of(folder: Path, more: str) -> Classifier:
    return load_classifier(f"mllm:{folder}{more}", NAMES, ["{}"])


def test_logits_are_log_probabilities_of_the_names(folder: Path) -> None:
    model, pixels = classifier(folder), torch.rand(3, 3, SIDE, SIDE)
    speaker = model.speaker
    with torch.no_grad():
        found = model(pixels)
        for place, name in enumerate(NAMES):
            ids = torch.tensor([speaker.tongue.answer_ids(speaker.question, name)]).repeat(3, 1)
            logits = speaker.next_logits(speaker.tokens(pixels), ids)
            alone = logits.log_softmax(-1).gather(2, ids[..., None]).sum((1, 2))
            assert torch.allclose(found[:, place], alone, atol=1e-4)
    assert model.class_embeddings is None
    assert model.predict(pixels).classes.tolist() == found.argmax(1).tolist()


def test_what_averages_features_keeps_the_lengths_of_tokens_from_the_image(folder: Path) -> None:
    plain, smoothed = classifier(folder), classifier(folder, "+smooth:0.000001:2")
    pixels = torch.rand(3, 3, SIDE, SIDE)
    with torch.no_grad():
        raw, fixed = image_tokens(plain.vlm, pixels), image_tokens(smoothed.vlm, pixels)
    assert torch.allclose(fixed.norm(dim=-1), plain.speaker.lengths.expand(3, -1), atol=1e-3)
    assert F.cosine_similarity(raw, fixed, dim=-1).min() > 0.999
    # A tower whose tokens all have their place's length answers the same.
    plain.speaker.lengths.copy_(raw.norm(dim=-1)[0])
    smoothed.speaker.lengths.copy_(raw.norm(dim=-1)[0])
    with torch.no_grad():
        assert torch.allclose(plain(pixels[:1]), smoothed(pixels[:1]), atol=1e-3)


@pytest.mark.parametrize("name", list(DEFENCES))
def test_a_defence_that_does_nothing_is_the_undefended_model_to_the_bit(name: str, folder: Path) -> None:
    plain, off = classifier(folder), classifier_of(folder, f"+{name}:{DEFENCES[name].off}")
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(off(pixels), plain(pixels))


def test_what_moves_pixels_alone_leaves_the_lengths_of_tokens_as_they_are(folder: Path) -> None:
    base, pixels = load_pipeline(f"mllm:{folder}"), torch.rand(2, 3, SIDE, SIDE)
    speaker = speaker_of(base)
    assert speaker is not None
    bits = load_pipeline(f"mllm:{folder}+bits:2")
    torch.manual_seed(0)
    purifier = Purifier(PurifierShape(widths=(8,)))
    for weight in purifier.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    pure, mapped = (PurifiedVLM(base, purifier, mapper) for mapper in (None, Mapper(MapperShape(24, tokens=4))))
    with torch.no_grad():
        raw = speaker.tokens(pixels)
        assert torch.equal(image_tokens(bits, pixels), speaker.tokens((pixels * 3).round() / 3))
        assert torch.equal(image_tokens(pure, pixels), raw)
        assert torch.equal(image_tokens(mapped, pixels), raw)
        noisy = image_tokens(pure.at_noise(0.25), pixels)
        assert torch.equal(noisy, speaker.tokens(purifier(pixels, 0.25)))
        fixed = image_tokens(mapped.at_noise(0.25), pixels)
        assert torch.allclose(fixed.norm(dim=-1), speaker.lengths.expand(2, -1), atol=1e-3)
    for around in (bits, pure):
        given = pixels.clone().requires_grad_()
        image_tokens(around, given).norm(dim=-1).sum().backward()
        assert given.grad is not None
        assert (given.grad.flatten(1).abs().amax(1) > 0).all()


def test_gradients_through_smoothing_and_the_language_model(folder: Path) -> None:
    model = classifier(folder, "+smooth:0.1:6")
    pixels = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    torch.manual_seed(0)
    model(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    whole, pixels.grad = pixels.grad.clone(), None
    smoothed = model.vlm
    assert isinstance(smoothed, SmoothedVLM)
    smoothed.rows_per_pass = 4  # in passes that are computed anew on the way back
    torch.manual_seed(0)
    model(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert (whole.flatten(1).norm(dim=1) > 0).all()


def test_answers_as_features_are_the_same_classes_and_stand_inside_the_noise(folder: Path) -> None:
    vlm = load_pipeline(f"mllm:{folder}")
    counted, pixels = answers_of(vlm, NAMES), torch.rand(4, 3, SIDE, SIDE)
    assert isinstance(counted, AnswerVLM)
    features = counted.encode_image(pixels)
    wanted = classifier(folder)(pixels)
    assert torch.allclose(features.square(), wanted.softmax(1), atol=1e-5)
    assert (features @ counted.class_vectors(NAMES).T).argmax(1).tolist() == wanted.argmax(1).tolist()
    smoothed = answers_of(load_pipeline(f"mllm:{folder}+smooth:0.1:8"), NAMES)
    assert isinstance(smoothed, SmoothedVLM)
    assert isinstance(smoothed.base, AnswerVLM)
    assert (smoothed.sigma, smoothed.n0) == (0.1, 8)
    clip = load_model("tiny")
    assert answers_of(clip, NAMES) is clip


def test_certified_votes_bound_a_linear_attack(folder: Path) -> None:
    smoothed = Smoothed(classifier(folder), sigma=0.1)
    found = certify_tensors(smoothed, torch.rand(2, 3, SIDE, SIDE), n=200, n0=20)
    assert found.classes.shape == (2,)
    assert ((found.radius > 0) == (found.classes >= 0)).all()


def test_what_has_no_language_model_or_no_classes_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no language model"):
        Answering(load_model("tiny"), NAMES)
    with pytest.raises(UserError, match="at least 2"):
        Answering(load_model(f"mllm:{folder}"), NAMES[:1])
    with pytest.raises(UserError, match="@pooled"):
        load_classifier(f"mllm:{folder}@pooled+smooth:0.1:2", NAMES, ["{}"])(torch.rand(1, 3, SIDE, SIDE))


def test_the_mapper_corrects_each_token_by_itself() -> None:
    torch.manual_seed(0)
    mapper = Mapper(MapperShape(dim=6, hidden=1.0, tokens=3, embedding=8))
    for weight in mapper.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    rows = F.normalize(torch.randn(2, 3, 6), dim=-1)
    features = rows.flatten(1) / 3**0.5
    found = mapper(features, 0.3).view(2, 3, 6)
    alone = Mapper(MapperShape(dim=6, hidden=1.0, embedding=8))
    alone.load_state_dict(mapper.state_dict())
    assert torch.allclose(found, alone(rows.view(6, 6), 0.3).view(2, 3, 6) / 3**0.5, atol=1e-5)
    assert torch.equal(mapper(features, 0.0), features)


def _images(place: Path, folder: Path) -> None:
    """Write pictures into folders by what the model itself says of them."""
    model = classifier(folder)
    for name in NAMES:
        (place / name).mkdir(parents=True)
    for number, image in enumerate(pictures(8)):
        label = NAMES[int(model(to_pixels(image, model.framing)[None]).argmax())]
        image.save(place / label / f"{number}.png")


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    _images(tmp_path / "photos", folder)
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    pictures(1)[0].rotate(180).save(tmp_path / "aim.png")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, data: bool = True) -> Any:
        shared = ["--data", "imagefolder:photos", "--classes", "names.txt"] if data else []
        monkeypatch.setattr(sys, "argv", ["robustvlm", *words, *shared, "--name", "r"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
        return json.loads((tmp_path / "runs/r/summary.json").read_text())

    return call


def test_attacked_through_the_language_model_with_words_in_the_report(
    folder: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    found = command("attack", f"mllm:{folder}", "--eps", "16/255", "--attack", "pgd:steps=8", "--checks", "none")
    assert found["clean_accuracy"]["value"] == 1.0
    assert found["per_eps"][0]["fooled"] > 0
    pair = next((tmp_path / "runs/r/gallery").glob("*.safetensors"))
    model = load_model(f"mllm:{folder}")
    assert isinstance(model, MllmVLM)
    with safe_open(pair, framework="pt") as file:
        about, adversarial = file.metadata(), file.get_tensor("adversarial")
    assert model.say(model.tokens(adversarial[None])) == [about["words"]]
    page = (tmp_path / "runs/r/report.html").read_text()
    assert "of which the model says" in page


@pytest.mark.parametrize("goal", ["unsay", "unsay:prototypes", "say:a cat", "match:foa:aim.png", "feature"])
def test_goals_of_words_and_features_run_on_a_smoothed_model(
    goal: str, folder: Path, command: Callable[..., Any]
) -> None:
    spec, attack = f"mllm:{folder}+smooth:0.02:2", "pgd:steps=2"
    rest = ("--checks", "none", "--eot", "1", "--draws", "3", "--eps", "16/255", "--limit", "3")
    found = command("attack", spec, "--goal", goal, "--attack", attack, *rest)
    assert found["images"]["evaluated"] == 3
    if goal in ("unsay", "say:a cat"):
        assert found["clean_accuracy"]["successes"] == found["images"]["exposed"]


@pytest.mark.parametrize("claim", ["vote", "feature", "tokens"])
def test_certified_by_the_command(claim: str, folder: Path, command: Callable[..., Any]) -> None:
    found = command(
        "certify", f"mllm:{folder}", "--claim", claim, "--sigma", "0.05", "--samples", "400", "--limit", "2"
    )
    assert found["images"] == 2
    if claim == "vote":
        audited = audit_folder(Path("runs/r"), effort=Effort(), limit=1)
        assert audited.findings, "the model that was certified is the one that is audited"
    if claim == "tokens":
        assert found["tokens"] == 4
        assert found["at_tokens"][0]["worst"] > 0.5
        few = Effort(starts=4, steps=3, draws=4, choice=32, evidence=256, fractions=(1.0,))
        audited = audit_folder(Path("runs/r"), effort=few, limit=1)
        assert not audited.broken
        assert "each of the 4 image tokens" in Path("runs/r/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--claim", "class"], "answers in words: pass --claim vote"),
        (["--claim", "openset", "--tau", "0.5"], "answers in words: pass --claim vote"),
        (["--claim", "vote", "--cache", "float32"], "cannot be kept for other prompts: leave out --cache"),
    ],
)
def test_what_no_deployed_model_says_is_not_certified(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["certify", "mllm:tiny+smooth:0.1:4", "--limit", "2", "--samples", "200", *options, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["robustvlm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_words_are_kept_in_any_precision(folder: Path, command: Callable[..., Any]) -> None:
    rest = ("--eps", "32/255", "--attack", "pgd:steps=8", "--checks", "none", "--precision", "fp64")
    assert command("attack", f"mllm:{folder}", *rest)["per_eps"][0]["fooled"] > 0


def test_words_that_are_not_known_are_refused() -> None:
    known = ["owl", "dog"]
    for wrong, said in (
        (["owl", "xyzzy"], "'xyzzy' has words that the language model does not know"),
        (["owl", "dog", "owl"], "'owl' and 'owl' are the same tokens"),
        (["owl", "<image>"], "does not know: '<image>'"),
    ):
        with pytest.raises(UserError, match=said):
            load_classifier("mllm:tiny", wrong, ["{}"])
    with pytest.raises(UserError, match=r"question 'wo ist der hund\?' has words"):
        load_classifier("mllm:tiny#wo ist der hund?", known, ["{}"])
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_model("mllm:tinny")


def test_a_copy_in_another_precision_follows_the_weights(folder: Path) -> None:
    model = load_model(f"mllm:{folder}")
    assert isinstance(model, MllmVLM)
    first = model.in_type(torch.float64)
    assert model.in_type(torch.float64) is first
    with torch.no_grad():
        model.model.lm_head.weight.zero_()
    assert not model.in_type(torch.float64).model.lm_head.weight.any()


def test_a_mapper_over_tokens_is_trained_kept_and_answered_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _images(tmp_path / "photos", folder)
    (tmp_path / "held" / "cat").mkdir(parents=True)
    for number, image in enumerate(pictures(4)):
        image.rotate(90).save(tmp_path / "held" / "cat" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    words = ["purify", f"mllm:{folder}", "--sigma", "0.05", "--only", "mapper", "--mapper-steps", "2", "--name", "p"]
    words += ["--data", "imagefolder:photos", "--val", "imagefolder:held", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["robustvlm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    card = json.loads((tmp_path / "runs/p/model.json").read_text())
    assert card["settings"]["mapper"]["tokens"] == 4
    assert card["settings"]["mapper"]["dim"] == 24
    model = load_classifier("runs/p+smooth:0.05:2", NAMES, ["{}"])
    assert isinstance(model, Answering)
    asked = load_pipeline("runs/p#a photo of the cat+smooth:0.05:2")
    speaker = speaker_of(asked)
    assert speaker is not None
    assert speaker.question == "a photo of the cat" != model.speaker.question
    assert asked.fingerprint != model.encoder.fingerprint
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert model(pixels).isfinite().all()
        assert len(model.say(pixels)) == 2
        smoothed = model.encoder
        assert isinstance(smoothed, SmoothedVLM)
        assert isinstance(asked, SmoothedVLM)
        tokens = smoothed.encode_noisy(pixels).view(2, 4, 24)
        assert torch.equal(asked.encode_noisy(pixels).view(2, 4, 24), tokens)
    # Certificates of tokens, and their lengths for the language model, need tokens of one length.
    assert torch.allclose(tokens.norm(dim=2), torch.full((2, 4), 0.5), atol=1e-5)
    with pytest.raises(UserError, match="asks nothing"):
        load_pipeline("runs/p#")
    with pytest.raises(UserError, match="answers no questions"):
        asking(load_model("tiny"), "what is it?")
