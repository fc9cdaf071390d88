"""An image encoder inside a language model: pixels to tokens, and what the language model says of tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.core.size import Size, sides
from robustvlm.errors import UserError
from robustvlm.models.mllm.families import Family
from robustvlm.models.mllm.tongue import Options, Tongue
from robustvlm.models.transformers_pixels import Preprocessing
from robustvlm.models.vlm import VLM, check_pixels, resize

PREFIX = "mllm:"
QUESTION = "What is it?"
MOST_WORDS = 24
"""Tokens of an answer; what would come behind them is left out."""
_PICTURES = 8


class MllmVLM(VLM):
    """A multimodal model: image tower, projector and language model, with one question put to every image.

    As an encoder its feature is that of all image tokens at once: unit tokens [T, D], as the projector receives them,
    side by side and over sqrt(T), so that a cosine of features is the mean cosine of tokens, and the token of largest
    norm weighs as much as the others. With `pooled` it is the mean of the unit tokens.

    What averages or changes features hands back `tokens_of` them: each token at unit norm times a length that is fixed
    for its place, so that no image chooses the lengths. `lengths` [T] are means over a few fixed pictures.

    Args:
        model: of transformers, for conditional generation. how: preprocessing. tongue: tokenizer and prompts.
        family: how its parts are put together.
        question: asked of every image.
    """

    counted_at = "tokens"
    mean: Tensor
    std: Tensor
    lengths: Tensor

    def __init__(
        self,
        model: nn.Module,
        how: Preprocessing,
        tongue: Tongue,
        folder: Path,
        *,
        spec: str,
        config: str,
        family: Family,
        question: str = QUESTION,
        pooled: bool = False,
    ) -> None:
        super().__init__(spec=spec, logit_scale=1.0, **how.framing.options())
        self.model: Any = model
        self.how, self.tongue, self.folder, self.config = how, tongue, folder, config
        self.family, self.question, self.pooled = family, question, pooled
        self.prompt = tongue.prompt(question)
        place = next(model.parameters()).device
        for name in ("mean", "std"):
            value = torch.tensor(getattr(how, name), dtype=torch.float32, device=place)
            self.register_buffer(name, value.view(1, -1, 1, 1))
        self._in: dict[torch.dtype, tuple[list[Any], MllmVLM]] = {}
        self.eval().requires_grad_(False)
        with torch.no_grad():
            tokens = self.tokens(_pictures(self.image_size).to(place))
            self.register_buffer("lengths", tokens.norm(dim=-1).mean(0))
        self.width = int(tokens.shape[-1])

    # The encoder

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return image tokens [B, T, D] of pixels [B, 3, S, S], as the projector receives them."""
        return self.family.tokens(self.model.model, (pixels - self.mean) / self.std)

    def raw_tokens(self, pixels: Tensor) -> Tensor:
        """Return image tokens [B, T, D] of square pixels [B, 3, H, H] of any size."""
        check_pixels(pixels, self.image_size)
        return self.tokens(resize(pixels, self.image_size, self.interpolation))

    def tokens_of(self, features: Tensor) -> Tensor:
        """Return tokens [B, T, D] of features [B, T * D], each at the length of its place."""
        if self.pooled:
            raise UserError(f"'{self.spec}' gives pooled features, which no answer follows from: leave out @pooled")
        unit = F.normalize(features.view(len(features), len(self.lengths), -1), dim=-1)
        return unit * self.lengths[:, None].to(unit)

    def _image_features(self, pixels: Tensor) -> Tensor:
        unit = F.normalize(self.tokens(pixels), dim=-1)
        return unit.mean(dim=1) if self.pooled else unit.flatten(1) / math.sqrt(unit.shape[1])

    def _text_features(self, texts: list[str]) -> Tensor:
        del texts
        raise UserError(
            f"'{self.spec}' answers in words and has no text encoder, so that texts and captions cannot be compared "
            "with its images: leave these out, or pass a CLIP-like model"
        )

    # The language model

    def hidden(self, tokens: Tensor, ids: Tensor, *, seen: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
        """Return hidden states [B, 1 + L, H]: of the prompt's last token, and of further tokens `ids` [B, L].

        Args:
            tokens: image tokens [B, T, D], as `tokens` and `tokens_of` give them.
            seen: bool [L, L], where a further token sees another; default: all before it. All see the prompt.
            depth: place [L] of each behind the prompt, from 0; default: in their order.
        """
        net = self.model.model
        asked, image = self._asked(tokens)
        embeds = torch.cat([asked, net.get_input_embeddings()(ids).to(asked)], dim=1)
        prompt, further = asked.shape[1], ids.shape[1]
        self._require_window(embeds.shape[1])
        mask = self.family.sees(len(self.prompt.before), image, len(self.prompt.after), further, ids.device)
        if seen is not None:
            mask[prompt:, prompt:] = seen
        behind = torch.arange(further, device=ids.device) if depth is None else depth
        places = self.family.places(len(self.prompt.before), image, len(self.prompt.after), behind)
        hidden: Tensor = net.language_model(
            inputs_embeds=embeds,
            attention_mask=_additive(mask, embeds).expand(len(embeds), 1, -1, -1),
            position_ids=places[..., None, :].expand(*places.shape[:-1], len(embeds), -1),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -(1 + further) :]

    def next_logits(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return logits [B, L, V] of each token of answers `ids` [B, L], given the image and what stands before.

        Filling (-1) at the end of an answer is no token; what stands in its rows means nothing.
        """
        known = ids.clamp_min(0)[:, :-1]
        logits: Tensor = self.model.lm_head(self.hidden(tokens, known))
        return logits

    def option_scores(self, tokens: Tensor, options: Options) -> Tensor:
        """Return log probabilities [B, K] that an answer begins with each option; see `Options`."""
        ids = options.ids.to(tokens.device).expand(len(tokens), -1)
        hidden = self.hidden(tokens, ids, seen=options.seen.to(ids.device), depth=options.depth.to(ids.device))
        logits: Tensor = self.model.lm_head(hidden)
        return options.gather(logits if logits.dtype == torch.float64 else logits.float())

    @torch.no_grad()
    def greedy(self, tokens: Tensor) -> Tensor:
        """Return the ids [B, MOST_WORDS] of greedy answers, filled up with -1 behind the end."""
        made = self._generated(tokens) if self.family.generates else self._read_on(tokens)
        ends = torch.tensor(self.tongue.ends, device=made.device)
        ended = torch.isin(made, ends).int().cumsum(1)
        # The end itself is kept: it is a token of the answer.
        made = made.masked_fill(ended - torch.isin(made, ends).int() > 0, -1)
        return F.pad(made, (0, MOST_WORDS - made.shape[1]), value=-1)

    def _generated(self, tokens: Tensor) -> Tensor:
        embeds, _ = self._asked(tokens)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with torch.autocast(embeds.device.type, enabled=False):
            made: Tensor = self.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=MOST_WORDS)
        return made

    def _read_on(self, tokens: Tensor) -> Tensor:
        """Return the ids [B, L] of greedy answers, a whole pass for each token: their masks are ours."""
        made = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
        ends = torch.tensor(self.tongue.ends, device=tokens.device)
        for _ in range(MOST_WORDS):
            logits = self.model.lm_head(self.hidden(tokens, made)[:, -1])
            made = torch.cat([made, logits.argmax(-1, keepdim=True)], dim=1)
            if torch.isin(made, ends).any(1).all():
                break
        return made

    def say(self, tokens: Tensor) -> list[str]:
        """Return greedy answers to the question."""
        return [self.text_of(row) for row in self.greedy(tokens).tolist()]

    @property
    def shape(self) -> tuple[int, int]:
        """Number and length of the tokens of an image."""
        return len(self.lengths), self.width

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, each as good as another."""
        return tuple(dict.fromkeys(self.tongue.ends))

    def text_of(self, ids: Sequence[int]) -> str:
        """Return an answer's token ids, up to the end, as a text in one line."""
        return self.tongue.text(ids)

    def ids_of(self, answer: str) -> list[int]:
        """Return the token ids of an answer to the question, with one of its ends."""
        return [*self.tongue.answer_ids(self.question, answer), self.tongue.ends[0]]

    def in_type(self, dtype: torch.dtype) -> MllmVLM:
        """Return the same model in a number type; one in another is copied once."""
        if next(self.model.parameters()).dtype == dtype:
            return self
        # Weights that were changed in place, replaced or moved are others.
        state = [(value.data_ptr(), value._version, value.device) for value in self.state_dict(keep_vars=True).values()]
        known = self._in.pop(dtype, None)
        if known is None or known[0] != state:
            known = state, copy.deepcopy(self).to(dtype)
        self._in[dtype] = known
        return known[1]

    @torch.no_grad()
    def anchors(self) -> Tensor:
        """Return the image tokens [K, T, D] of a few fixed pictures that show nothing."""
        return self.tokens(_pictures(self.image_size).to(self.mean))

    def options(self, answers: Sequence[str]) -> Options:
        """Return a list of answers, to be scored all at once.

        Raises:
            UserError: an answer has words that are not known, or two are the same tokens.
        """
        ids = [self.tongue.answer_ids(self.question, answer) for answer in answers]
        for place, one in enumerate(ids):
            if (first := ids.index(one)) < place:
                both = f"'{answers[first]}' and '{answers[place]}'"
                raise UserError(f"{both} are the same tokens to the language model: leave out one of them")
        return Options.of(ids, self.ends)

    def asking(self, question: str) -> MllmVLM:
        """Return the same model with another question; the weights are shared."""
        return MllmVLM(
            self.model,
            self.how,
            self.tongue,
            self.folder,
            spec=self.spec.partition("#")[0] + f"#{question}",
            config=self.config,
            family=self.family,
            question=question,
            pooled=self.pooled,
        ).to(self.device)

    def _asked(self, tokens: Tensor) -> tuple[Tensor, int]:
        """Return the prompt with the image in it [B, S, H], and the number of places that the image takes."""
        image = self.family.project(self.model.model, tokens)
        before, after = (self._embedded(part, len(image)) for part in (self.prompt.before, self.prompt.after))
        return torch.cat([before.to(image), image, after.to(image)], dim=1), image.shape[1]

    def _require_window(self, tokens: int) -> None:
        """Refuse a text longer than what some layer of the language model looks back: that mask is not made here."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window and tokens > window and getattr(config, "use_sliding_window", True):
            raise UserError(
                f"the prompt of '{self.spec}' and its answer have {tokens} tokens; layers of its language model see "
                f"the last {window} alone: ask a shorter question"
            )

    def _embedded(self, ids: Sequence[int], rows: int) -> Tensor:
        found: Tensor = self.model.model.get_input_embeddings()(
            torch.tensor([list(ids)], device=self.device, dtype=torch.long)
        )
        return found.expand(rows, -1, -1)

    def _identity(self) -> Iterable[str]:
        words = (self.tongue.digest, self.prompt.text, str(self.pooled))
        return type(self.model).__name__, self.config, *words, *self.family.identity


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    """Return what is added to attention scores [1, 1, S, S]: 0 where a token is seen, the lowest number elsewhere."""
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, lowest)[None, None]


def _pictures(size: Size) -> Tensor:
    """Return a few smooth pictures [N, 3, H, W], the same every time."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(_PICTURES, 3, 5, 5, generator=draws)
    return F.interpolate(coarse, sides(size), mode="bicubic", align_corners=False).clamp(0, 1)
