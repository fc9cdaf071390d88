"""A model that answers in words, as a classifier of its answers to a closed question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.goals.words import first_named
from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.mllm import MllmVLM
from robustvlm.models.mllm.tongue import Options

NO_CLASS = "(no class)"
"""What an answer is that names no class."""


def speaker_of(vlm: VLM | None) -> MllmVLM | None:
    """Return the language model that an encoder stands before: the encoder itself, or the one inside of a defence."""
    if vlm is None:
        return None
    return next((part for part in vlm.modules() if isinstance(part, MllmVLM)), None)


def token_shape(vlm: VLM | None) -> tuple[int, int]:
    """Return number and length of the image tokens that an encoder's features hold side by side; (1, 0) without."""
    speaker = None if isinstance(vlm, AnswerVLM) else speaker_of(vlm)
    return (1, 0) if speaker is None or speaker.pooled else speaker.shape


def asking(vlm: VLM, question: str) -> VLM:
    """Put another question to every image, whatever stands around a language model, and return the model.

    What stands around it is changed in place; a language model alone is left as it is.

    Raises:
        UserError: there is no language model, or it does not know the words.
    """
    speaker = speaker_of(vlm)
    if speaker is None:
        raise UserError(f"'{vlm.spec}' answers no questions: leave out '#{question}'")
    asked = speaker.asking(question)
    for part in list(vlm.modules()):
        for name, child in part.named_children():
            if child is speaker:
                setattr(part, name, asked)
    return asked if vlm is speaker else vlm


def image_tokens(vlm: VLM, pixels: Tensor) -> Tensor:
    """Return image tokens [B, T, D] of pixels [B, 3, H, H] for the language model.

    Those of the model itself are as its tower gives them, whatever changed the pixels before. What averages or changes
    features (smoothing, a mapper, a defence of features) gives unit tokens, which get the lengths of their places.
    """
    speaker = speaker_of(vlm)
    if speaker is None:
        raise UserError(f"'{vlm.spec}' has no language model: pass mllm:NAME (docs/mllm.md)")
    if isinstance(vlm, MllmVLM):
        return vlm.raw_tokens(pixels)
    below = vlm.ask_below(image_tokens, pixels)
    return speaker.tokens_of(vlm.encode_image(pixels)) if below is None else below


class Answering(Classifier):
    """What a language model says of an image, among the classes: logits are log probabilities of the class names.

    An image's class is the name that the answer to the model's question most likely begins with. The encoder may be
    smoothed, purified or defended: the language model then reads the tokens that come out.

    Args:
        vlm: `MllmVLM`, or what stands around one. class_names: the answers.

    Raises:
        UserError: there is no language model, or two names are the same tokens to it.
    """

    def __init__(self, vlm: VLM, class_names: Sequence[str]) -> None:
        super().__init__(spec=vlm.spec, class_names=class_names, logit_scale=1.0, **vlm.framing.options())
        speaker = speaker_of(vlm)
        if speaker is None:
            raise UserError(f"'{vlm.spec}' has no language model: pass mllm:NAME (docs/mllm.md)")
        if len(class_names) < 2:
            raise UserError(f"a closed question needs at least 2 answers, got {len(class_names)}")
        self.encoder = vlm
        self.options: Options = speaker.options(class_names)
        self.eval().requires_grad_(False)

    @property
    def vlm(self) -> VLM:
        return self.encoder

    @property
    def speaker(self) -> MllmVLM:
        """The language model that answers."""
        found = speaker_of(self.encoder)
        assert found is not None
        return found

    @property
    def fingerprint(self) -> str:
        # Models with one token that ends an answer keep the digest from before the others counted.
        ends = (f"any of {len(self.options.ends)} ends",) * (len(self.options.ends) > 1)
        return fingerprint({}, (self.encoder.fingerprint, "answers", *ends, *self.class_names))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return log probabilities [B, K] of the answers."""
        return self.speaker.option_scores(image_tokens(self.encoder, pixels), self.options)

    @torch.no_grad()
    def say(self, pixels: Tensor) -> list[str]:
        """Return greedy answers in words to images [B, 3, H, H], whatever the classes are."""
        return self.speaker.say(image_tokens(self.encoder, pixels))


class AnswerVLM(VLM):
    """The answers to a closed question as features, for what counts or averages the answers to noisy copies.

    A feature is the square root of the probabilities of the answers, which has unit norm, and each class is an axis,
    as for classifiers of a library: the class of an image is the same. The whole model stands behind the noise.

    Args:
        base: the encoder below, as `Answering` takes it.
    """

    kind: ClassVar[type[Answering]] = Answering

    def __init__(self, base: VLM, class_names: Sequence[str]) -> None:
        super().__init__(spec=base.spec, logit_scale=1.0, **base.framing.options())
        self.answering = self.kind(base, class_names)
        self.names = tuple(class_names)
        self._anchor = self._anchor.to(base.device)
        self.eval().requires_grad_(False)

    def at_noise(self, sigma: float) -> VLM:
        return type(self)(self.answering.encoder.at_noise(sigma), self.names)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return (0.5 * self.answering(pixels).log_softmax(dim=1)).exp()

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.answering.speaker.embed_text(texts)

    def class_vectors(self, class_names: Sequence[str]) -> Tensor:
        """Return the axes [K, D] of the classes."""
        known = {name: place for place, name in enumerate(self.answering.class_names)}
        return torch.eye(len(known), device=self.device)[[known[name] for name in class_names]]

    def _identity(self) -> Iterable[str]:
        return ("answers", self.answering.fingerprint)


class Naming(Answering):
    """The class that a language model's free answer names first, or the last class, which is that it names none.

    The question is any, as "describe the picture."; see `first_named` for what names a class. Logits are 1 for what is
    said and 0 for the rest, without a gradient. What keeps certificates of claim `named` is a vote of it over noise:
    `robustvlm.Smoothed(Naming(load_model("mllm:NAME#QUESTION"), class_names), sigma)`.
    """

    def __init__(self, vlm: VLM, class_names: Sequence[str]) -> None:
        super().__init__(vlm, class_names)
        self.class_names = (*self.class_names, NO_CLASS)

    @property
    def fingerprint(self) -> str:
        return fingerprint({}, (self.encoder.fingerprint, "names", *self.class_names))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return [B, K + 1], 1 at the class that is named."""
        names = self.class_names[:-1]
        found = [first_named(answer, names) for answer in self.say(pixels)]
        places = torch.tensor([len(names) if one is None else one for one in found], device=pixels.device)
        return F.one_hot(places, len(names) + 1).to(pixels.dtype)


class NamingVLM(AnswerVLM):
    """The class that the free answer names as a feature, its axis; an answer that names none has an axis of its own."""

    kind = Naming

    def _image_features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.answering(pixels)
        return found


def answers_of(vlm: VLM, class_names: Sequence[str], *, in_words: bool = False) -> VLM:
    """Return the encoder to certify the class of: the answers themselves of a model that answers in words.

    Of a smoothed one the noise then stands before the whole model, whose answers are counted, and not before its
    image tower, whose tokens are averaged. Other encoders are returned as they are.

    Args:
        in_words: the class that the free answer names, in place of the likeliest name.

    Raises:
        UserError: a smoothed model with hooks of the caller's.
    """
    if speaker_of(vlm) is None or isinstance(vlm, AnswerVLM):
        return vlm
    kind = NamingVLM if in_words else AnswerVLM
    if not isinstance(vlm, SmoothedVLM):
        return kind(vlm, class_names)
    if vlm.purifier is not None or vlm.mapper is not None:
        raise UserError(f"'{vlm.spec}' has hooks behind its noise: answers are certified of mllm:NAME+smooth:SIGMA")
    return SmoothedVLM(
        kind(vlm.base, class_names),
        vlm.sigma,
        vlm.n0,
        rows_per_pass=vlm.rows_per_pass,
        threat=vlm.noise.threat.name,
    )
