"""Zero-shot heads: prompt ensembles by hand, batching, and a cache that never changes an answer."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from robustvlm.core.loading import telling
from robustvlm.errors import UserError
from robustvlm.models import VLM, ZeroShotClassifier, load_model, zero_shot
from robustvlm.models.class_cache import cache_file, forget_embeddings
from robustvlm.models.zero_shot import cut_prompts

NAMES = ["apple", "border collie", "truck {}", "Émile's café"]
TEMPLATES = ["a photo of a {}.", "{}", "the {} and the {}"]


@pytest.fixture
def vlm(save_clip: Callable[..., Path]) -> VLM:
    return load_model(str(save_clip()))


class Counting(VLM):
    """Text features from letters; counts what it encodes."""

    def __init__(self) -> None:
        super().__init__(spec="counting", image_size=4, logit_scale=10.0)
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.encoded: list[int] = []

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :16]

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        self.encoded.append(len(texts))
        rows = [torch.tensor([(hash_of(text) >> i) % 97 - 48.0 for i in range(16)]) for text in texts]
        return self.weight * torch.stack(rows)


def hash_of(text: str) -> int:
    return sum((i + 1) * 7919 * byte for i, byte in enumerate(text.encode()))


def by_hand(vlm: VLM, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    rows = []
    for name in names:
        prompts = [vlm.encode_text([name.join(template.split("{}"))])[0] for template in templates]
        rows.append(F.normalize(sum(prompts) / len(prompts), dim=0))
    return torch.stack(rows)


def test_classes_are_normalised_means_of_normalised_prompts(vlm: VLM) -> None:
    classifier = zero_shot(vlm, NAMES, TEMPLATES)
    expected = by_hand(vlm, NAMES, TEMPLATES)
    assert torch.allclose(classifier.class_embeddings, expected, atol=1e-6)
    pixels = torch.rand(3, 3, 16, 16)
    logits = vlm.logit_scale * vlm.encode_image(pixels) @ expected.T
    assert torch.allclose(classifier(pixels), logits, atol=1e-4)
    assert classifier.class_names == tuple(NAMES)


@pytest.mark.parametrize("per_batch", [1, 2, 5, 256])
def test_batching_over_prompts_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, per_batch: int) -> None:
    vlm = Counting()
    expected = by_hand(vlm, NAMES, TEMPLATES)
    vlm.encoded.clear()
    monkeypatch.setattr(sys.modules[zero_shot.__module__], "_TEXTS_PER_BATCH", per_batch)
    found = zero_shot(vlm, NAMES, TEMPLATES, cache=False).class_embeddings
    assert torch.allclose(found, expected, atol=1e-6)
    assert max(vlm.encoded) <= per_batch
    assert sum(vlm.encoded) == len(NAMES) * len(TEMPLATES)


def test_order_of_classes_only_permutes(vlm: VLM) -> None:
    forward = zero_shot(vlm, NAMES, TEMPLATES).class_embeddings
    backward = zero_shot(vlm, NAMES[::-1], TEMPLATES).class_embeddings
    assert torch.allclose(forward, backward.flip(0), atol=1e-6)


def test_gradients_reach_the_pixels_and_autocast_keeps_float32_logits(vlm: VLM) -> None:
    classifier = zero_shot(vlm, NAMES, TEMPLATES)
    pixels = torch.rand(2, 3, 16, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(pixels)
    assert logits.dtype == torch.float32
    assert torch.autograd.grad(logits[:, 0].sum(), pixels)[0].abs().sum() > 0


class TestCache:
    def test_a_second_call_encodes_one_class_only(self) -> None:
        vlm = Counting()
        first = zero_shot(vlm, NAMES, TEMPLATES).class_embeddings
        vlm.encoded.clear()
        again = zero_shot(vlm, NAMES, TEMPLATES).class_embeddings
        forget_embeddings()
        from_disk = zero_shot(vlm, NAMES, TEMPLATES).class_embeddings
        assert sum(vlm.encoded) == 2 * len(TEMPLATES)
        assert torch.equal(first, again)
        assert torch.equal(first, from_disk)

    @pytest.mark.parametrize("change", ["names", "order", "templates", "weights", "text tower"])
    def test_whatever_matters_is_part_of_the_key(self, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
        vlm, names, templates = Counting(), list(NAMES), list(TEMPLATES)
        zero_shot(vlm, names, templates)
        if change == "names":
            names[-1] = "something else"
        elif change == "order":
            names[1], names[2] = names[2], names[1]
        elif change == "templates":
            templates[1] = "a {}"
        elif change == "weights":
            vlm.weight.mul_(-1)
        else:
            plain = Counting._text_features
            monkeypatch.setattr(Counting, "_text_features", lambda self, texts: plain(self, texts).flip(1))
        assert torch.allclose(zero_shot(vlm, names, templates).class_embeddings, by_hand(vlm, names, templates))

    @pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "rows"])
    def test_a_damaged_file_is_computed_again_and_replaced(self, tmp_path: Path, damage: str) -> None:
        vlm = Counting()
        expected = zero_shot(vlm, NAMES, TEMPLATES).class_embeddings
        (file,) = (tmp_path / "cache").rglob("*.safetensors")
        whole = file.read_bytes()
        if damage == "rows":
            from safetensors.torch import save_file

            save_file({"class_embeddings": expected[:2].clone()}, file)
        else:
            flipped = bytearray(whole)
            flipped[-1] ^= 0x01
            file.write_bytes(
                {"empty": b"", "cut": whole[:-9], "noise": b"\x9a" * 300, "flipped": bytes(flipped)}[damage]
            )
        forget_embeddings()
        assert torch.equal(zero_shot(vlm, NAMES, TEMPLATES).class_embeddings, expected)
        assert file.read_bytes() == whole
        assert list(file.parent.iterdir()) == [file], "no temporary file is left"

    def test_a_folder_that_cannot_be_written_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert isinstance(zero_shot(Counting(), NAMES, TEMPLATES), ZeroShotClassifier)
        assert not cache_file("x").exists()

    def test_without_cache_nothing_is_written(self, tmp_path: Path) -> None:
        zero_shot(Counting(), NAMES, TEMPLATES, cache=False)
        assert not (tmp_path / "cache").exists()


class Watched(Counting):
    """Writes down how many texts it encodes, for other processes; may die, or take its time."""

    def __init__(self, log: Path, *, last: int = 10**6, pause: float = 0.0) -> None:
        super().__init__()
        self.log, self.last, self.pause = log, last, pause

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        if len(self.encoded) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        with self.log.open("a") as file:
            file.write(f"{len(texts)}\n")
        return super()._text_features(texts)


def apart(work: Callable[[], object]) -> int:
    """Start some work in a process of its own and return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes by fork")
class TestParts:
    MANY = tuple(f"thing number {i}" for i in range(30))
    BATCHES = 15
    """With two classes of three prompts in a batch."""

    @pytest.fixture(autouse=True)
    def _small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules[zero_shot.__module__], "_TEXTS_PER_BATCH", 6)

    def test_what_a_killed_process_computed_is_not_computed_again(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        expected = zero_shot(Watched(log), self.MANY, TEMPLATES, cache=False).class_embeddings
        log.unlink()
        # Its first batch is the class that tells encoders apart; it dies in its tenth.
        child = apart(lambda: zero_shot(Watched(log, last=9), self.MANY, TEMPLATES))
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        vlm = Watched(log)
        told: list[tuple[float | None, ...]] = []
        with telling(lambda *words: told.append(words)):
            found = zero_shot(vlm, self.MANY, TEMPLATES).class_embeddings
        assert torch.equal(found, expected)
        assert vlm.encoded == [3, *[6] * (self.BATCHES - 8)]
        assert told[0][:2] == (9 * 6, 90)
        assert told[-1] == (90, 90, 0.0)
        assert sorted(file.suffix for file in cache_file("x").parent.iterdir()) == [".safetensors"]

    @pytest.mark.parametrize("damage", ["flipped", "cut", "noise"])
    def test_what_follows_a_damaged_part_is_computed_again(self, tmp_path: Path, damage: str) -> None:
        expected = zero_shot(Counting(), self.MANY, TEMPLATES, cache=False).class_embeddings
        os.waitpid(apart(lambda: zero_shot(Watched(tmp_path / "log", last=9), self.MANY, TEMPLATES)), 0)
        (file,) = cache_file("x").parent.glob("*.part")
        content = bytearray(file.read_bytes())
        record = len(content) // 8
        if damage == "flipped":
            content[3 * record + record // 2] ^= 1
        file.write_bytes({"flipped": content, "cut": content[: 4 * record - 1], "noise": b"\x7f" * 999}[damage])
        vlm = Counting()
        assert torch.equal(zero_shot(vlm, self.MANY, TEMPLATES).class_embeddings, expected)
        assert len(vlm.encoded) - 1 == self.BATCHES - (0 if damage == "noise" else 3)

    def test_two_processes_at_once_share_one_computation(self, tmp_path: Path) -> None:
        def work() -> None:
            found = zero_shot(Watched(tmp_path / "log", pause=0.01), self.MANY, TEMPLATES).class_embeddings
            (tmp_path / f"found-{os.getpid()}").write_bytes(found.numpy().tobytes())

        children = [apart(work), apart(work)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        expected = zero_shot(Counting(), self.MANY, TEMPLATES, cache=False).class_embeddings.numpy().tobytes()
        assert [(tmp_path / f"found-{child}").read_bytes() for child in children] == [expected, expected]
        # All prompts once, and of each process those of the class that tells encoders apart.
        assert sum(map(int, (tmp_path / "log").read_text().split())) == 90 + 2 * 3

    def test_a_text_tower_that_breaks_leaves_nothing(self) -> None:
        vlm = Counting()
        vlm.weight.fill_(float("nan"))
        with pytest.raises(UserError, match="NaN or infinite"):
            zero_shot(vlm, self.MANY, TEMPLATES)
        assert list(cache_file("x").parent.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "templates", "says"),
    [
        ([], ["{}"], "at least 2 classes, got 0"),
        (["cat"], ["{}"], "at least 2 classes, got 1: 'cat'"),
        (["cat", "dog", "cat", "dog"], ["{}"], "repeated: 'cat', 'dog'"),
        (["cat", "dog  house", "dog house "], ["{}"], "repeated: 'dog house'"),
        (["cat", " "], ["{}"], "class 1 has an empty name"),
        ("cats", ["{}"], "must be a list"),
        (["cat", "dog"], [], "at least one text"),
        (["cat", "dog"], "a {}", "must be a list"),
        (["cat", "dog"], ["{}", "a photo"], "'a photo' has no {} for the class name"),
    ],
)
def test_wrong_classes_and_templates_are_named(names: Sequence[str], templates: Sequence[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        zero_shot(Counting(), names, templates)
    assert says in str(caught.value)


def test_a_text_tower_that_breaks_is_named() -> None:
    vlm = Counting()
    vlm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        zero_shot(vlm, NAMES, TEMPLATES)


def test_classes_with_one_embedding_are_refused_by_name(vlm: VLM) -> None:
    long = "a drawing on paper of " * 30
    with pytest.raises(
        UserError, match=r"cat' and 'a drawing .* dog' have the same embedding .*truncated .*tokens too long"
    ):
        zero_shot(vlm, [f"{long}cat", f"{long}dog"], ["{}"], cache=False)
    with pytest.raises(
        UserError, match=r"the classes 'cat' and 'CAT' have the same embedding .*cannot tell these names"
    ):
        zero_shot(vlm, ["dog", "cat", "CAT", "fox"], ["a {}"], cache=False)
    assert len(zero_shot(vlm, ["dog", "cat", "fox"], ["a {}"], cache=False).class_names) == 3


def test_own_encoders_are_asked_as_well() -> None:
    class Folded(Counting):
        def _text_features(self, texts: list[str]) -> torch.Tensor:
            return super()._text_features([text[:9] for text in texts])

    with pytest.raises(UserError, match=r"'long ago one' and 'long ago two' have the same embedding .*3 such pairs"):
        zero_shot(
            Folded(), ["long ago one", "x", "long ago two", "long ago three", "long ago four"], ["{}"], cache=False
        )
    zero_shot(Folded(), ["one", "two"], ["{}"], cache=False)


class OfTransformers:
    """Cuts texts into words as open_clip's wrapper of a tokenizer of transformers does: it has no `encode`."""

    tokenizer_mode = ""

    def clean_fn(self, text: str) -> str:
        return " ".join(text.split())

    def tokenizer(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        assert not verbose  # transformers warns of long texts otherwise
        return {"input_ids": [1, *(3 for _ in text.split()), 2]}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        return torch.tensor([(row if len(row) <= 8 else [*row[:7], 2]) + [0] * (8 - len(row)) for row in rows])


def test_tokens_of_a_tokenizer_of_transformers_are_counted(vlm: VLM) -> None:
    whole = copy.copy(vlm)
    whole.tokenizer = OfTransformers()  # type: ignore[assignment]
    assert whole.cut_tokens(["cat", "cat " * 6, "cat " * 7, "cat " * 17]) == [0, 0, 1, 11]


@pytest.mark.parametrize("swallows", [False, True])
def test_a_tokenizer_that_takes_no_length_is_asked_whether_more_would_be_read(vlm: VLM, swallows: bool) -> None:
    def letters(texts: list[str], **given: int) -> torch.Tensor:
        if given and not swallows:
            raise TypeError("context_length")
        rows = [[ord(letter) % 50 + 1 for letter in text[:10]] for text in texts]
        return torch.tensor([row + [0] * (10 - len(row)) for row in rows])

    whole = copy.copy(vlm)
    whole.tokenizer = letters  # type: ignore[assignment]
    assert whole.cut_tokens(["z" * 4, "z" * 9, "z" * 16]) == [0, 0, 1]


def test_what_cleaning_spells_out_is_counted(vlm: VLM) -> None:
    def letters(texts: list[str], context_length: int = 60) -> torch.Tensor:
        rows = [[ord(letter) % 50 + 1 for letter in unicodedata.normalize("NFKC", text)] for text in texts]
        return torch.tensor([(row + [0] * context_length)[:context_length] for row in rows])

    whole, sign = copy.copy(vlm), "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"
    whole.tokenizer = letters  # type: ignore[assignment]
    assert len(unicodedata.normalize("NFKC", sign)) == 18
    assert whole.cut_tokens([sign, 3 * sign, 4 * sign, 20 * sign]) == [0, 0, 12, 300]


def test_prompts_beyond_the_context_are_told(vlm: VLM) -> None:
    room = vlm.tokenizer([""]).shape[1]  # type: ignore[operator]
    fits, one_more = "cat " * (room - 2), "cat " * (room - 1)
    assert vlm.cut_tokens(["cat", fits, one_more, one_more + "cat cat"]) == [0, 0, 1, 3]
    assert cut_prompts(vlm, ["cat", fits], ["{}"]) is None
    said = cut_prompts(vlm, ["cat", one_more], ["{}"])
    assert said is not None
    assert "the prompts of 1 of 2 classes" in said
    assert "1 token of 'cat cat" in said
