"""Models of the transformers library as VLMs: CLIP-like pairs, and image towers with a text side of another model."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustvlm.core.boundary import same_random_state
from robustvlm.core.framing import trial_pixels
from robustvlm.core.size import sides
from robustvlm.errors import UserError, nearest
from robustvlm.models import transformers_files as files
from robustvlm.models.transformers_pixels import Preprocessing, patches, preprocessing_of, require_equal
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import brief, read_weights

_log = logging.getLogger("robustvlm")

# Which models are known, and what is peculiar to each


@dataclass(frozen=True)
class Family:
    """A kind of model, by the `model_type` of its config.

    Args:
        name: class of transformers that computes it.
        texts: it has a text tower.
        fixed: texts are padded to the context length, as the model saw them in training.
        mask: padding is masked out; SigLIP was trained without a mask.
        lower: texts are lower-cased, as in training.
        end: the text feature is that of the token that ends the text, whose place the model seeks by its id.
        types: the text tower takes token types.
        offset: position ids begin behind the padding index, so that this many fewer tokens fit.
    """

    name: str
    texts: bool = True
    fixed: bool = True
    mask: bool = True
    lower: bool = False
    end: bool = False
    types: bool = False
    offset: bool = False


FAMILIES = {
    "clip": Family("CLIPModel", end=True),
    "metaclip_2": Family("MetaClip2Model", end=True),
    "siglip": Family("SiglipModel", mask=False, lower=True),
    "siglip2": Family("Siglip2Model", mask=False, lower=True),
    "altclip": Family("AltCLIPModel", fixed=False, offset=True),
    "chinese_clip": Family("ChineseCLIPModel", fixed=False, types=True),
    "clip_vision_model": Family("CLIPVisionModel", texts=False),
    "metaclip_2_vision_model": Family("MetaClip2VisionModel", texts=False),
    "siglip_vision_model": Family("SiglipVisionModel", texts=False),
    "siglip2_vision_model": Family("Siglip2VisionModel", texts=False),
    "vit": Family("ViTModel", texts=False),
    "dinov2": Family("Dinov2Model", texts=False),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", texts=False),
    "dinov3_vit": Family("DINOv3ViTModel", texts=False),
}
_PROJECTED = "WithProjection"
_NO_POOLER = ("vit",)  # its pooler is of the language model's kind, and untrained in most checkpoints


def pooled(output: Any, what: str) -> torch.Tensor:
    """Return pooled features [B, D]; version 4 of the library returns them bare, version 5 inside of an object.

    Never its first entry: that is the sequence of tokens.
    """
    found = output if torch.is_tensor(output) else getattr(output, "pooler_output", None)
    if not torch.is_tensor(found) or found.ndim != 2:
        shape = list(found.shape) if torch.is_tensor(found) else "none"
        raise UserError(f"{what} must give features [B, D], got {shape}: this version of transformers does not")
    return found


# Both towers of one model


class Words:
    """A tokenizer with the way in which a family's texts are read."""

    def __init__(self, tokenizer: Any, family: Family, room: int, digest: str) -> None:
        self.tokenizer, self.family, self.room, self.digest = tokenizer, family, room, digest
        # Its tokenizer lower-cases in most versions of the library; where it does not, we do.
        self.lower = family.lower and self._ids(["A CAT"]) != self._ids(["a cat"])

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what the text tower takes of texts."""
        found = self.tokenizer(
            self._written(texts),
            padding="max_length" if self.family.fixed else "longest",
            max_length=self.room,
            truncation=True,
            return_tensors="pt",
        )
        wanted = ["input_ids"]
        wanted += ["attention_mask"] if self.family.mask else []
        wanted += ["token_type_ids"] if self.family.types and "token_type_ids" in found else []
        return {name: found[name] for name in wanted}

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text do not fit."""
        return [max(0, len(ids) - self.room) for ids in self._ids(self._written(texts))]

    def identity(self) -> tuple[str, ...]:
        """Return texts naming all that decides the token ids."""
        return self.digest, str(self.room)

    def _written(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if getattr(self, "lower", False) else list(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return ids


_NOT_OF_TEXTS = ("vision_model.", "visual_projection.", "logit_scale", "logit_bias")


class TransformersVLM(VLM):
    """A model with an image and a text tower, its tokenizer, and the preprocessing of its processor.

    `logit_bias` is what SigLIP adds to its logits: the same for every class, so that only statements on one pair of an
    image and a text need it. `folder` is where the files are that it was read from, `config` what its config says.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, words: Words, how: Preprocessing, folder: Path, *, spec: str, config: str
    ) -> None:
        scale: Any = model.logit_scale
        super().__init__(spec=spec, logit_scale=float(scale.detach().float().exp()), **how.framing.options())
        bias: Any = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self.model, self.words, self.how, self.folder, self.config = model, words, how, folder, config
        _take_channels(self, how)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pooled(self._call("get_image_features", **_image_input(self, self.how, pixels)), "the image tower")

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        given = {name: tensor.to(self.device) for name, tensor in self.words(texts).items()}
        return pooled(self._call("get_text_features", **given), "the text tower")

    @property
    def text_fingerprint(self) -> str:
        """Digest of the text tower and the tokenizer: models whose image tower alone was trained share it."""
        texts = {name: value for name, value in self.model.state_dict().items() if not name.startswith(_NOT_OF_TEXTS)}
        return self._digest("text", texts, ("text", *self._identity()))

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length."""
        return self.words.cut(texts)

    def _call(self, name: str, **given: torch.Tensor) -> Any:
        method: Any = getattr(self.model, name)
        return method(**given)

    def _identity(self) -> Iterable[str]:
        return type(self.model).__name__, self.config, *self.words.identity()


def _take_channels(vlm: VLM, how: Preprocessing) -> None:
    vlm.register_buffer("mean", torch.tensor(how.mean, dtype=torch.float32).view(1, -1, 1, 1))
    vlm.register_buffer("std", torch.tensor(how.std, dtype=torch.float32).view(1, -1, 1, 1))


def _image_input(vlm: Any, how: Preprocessing, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what an image tower takes of pixels in [0, 1] at its own size; differentiable."""
    values = (pixels - vlm.mean) / vlm.std
    if not how.patch:
        return {"pixel_values": values}
    grid = [side // how.patch for side in sides(how.framing.image_size)]
    rows = patches(values, how.patch)
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(rows.shape[:2], dtype=torch.int32, device=rows.device),
        "spatial_shapes": torch.tensor([grid], device=rows.device).expand(len(rows), 2),
    }


# An image tower on its own, or beside the text tower of another model


class TowerVLM(VLM):
    """An image tower, with the text side of another model or none.

    Args:
        tower: gives image features of its inputs.
        text: the model whose texts share the space; without one, texts are refused.
        weight, bias: a linear map of image features [D_image] into the text side's space [D_text].
        mapped: that map says itself that it leads into the space of this text side.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        tower: nn.Module,
        how: Preprocessing,
        folder: Path,
        *,
        spec: str,
        config: str,
        text: VLM | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        mapped: bool = False,
    ) -> None:
        super().__init__(spec=spec, logit_scale=1.0 if text is None else text.logit_scale, **how.framing.options())
        self.logit_bias = None if text is None else text.logit_bias
        self.remarks = () if text is None or mapped else (_unchecked(spec, text.spec),)
        self.tower, self.text, self.how, self.folder, self.config = tower, text, how, folder, config
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        _take_channels(self, how)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = image_features(self.tower, _image_input(self, self.how, pixels))
        return features if self.weight is None else nn.functional.linear(features, self.weight, self.bias)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        if self.text is None:
            raise UserError(
                f"'{self.spec}' is an image tower without a text side: name the model whose texts share its space, as "
                f"{self.spec}@MODEL, or ask for features alone (from Python: perturb with goal='feature')"
            )
        return self.text.embed_text(texts)

    @property
    def text_fingerprint(self) -> str:
        return self.fingerprint if self.text is None else self.text.text_fingerprint

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length."""
        return [0] * len(texts) if self.text is None else self.text.cut_tokens(texts)

    def _state(self) -> Mapping[str, object]:
        own = dict(self.state_dict())
        if self.text is None:
            return own
        # A model knows best what its own weights are, be they out of a state dict's sight.
        theirs = {f"text.{name}": value for name, value in self.text._state().items()}
        return {name: value for name, value in own.items() if not name.startswith("text.")} | theirs

    def _identity(self) -> Iterable[str]:
        return type(self.tower).__name__, self.config, *(() if self.text is None else self.text.design)


def _unchecked(spec: str, text: str) -> str:
    return (
        f"nothing shows that the image tower of '{spec}' and the texts of '{text}' share one space, only their "
        f"dimensions agree: if they do not, every figure here is chance; compare clean accuracy with that of '{text}'"
    )


def image_features(tower: nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the pooled features [B, D] of an image tower: projected ones if it has them, else as it pools."""
    output: Any = tower(**given)
    if (projected := getattr(output, "image_embeds", None)) is not None:
        return pooled(projected, "the image tower")
    if getattr(tower.config, "model_type", None) in _NO_POOLER:
        return pooled(output.last_hidden_state[:, 0], "the image tower")
    return pooled(output, "the image tower")


# From a spec to a model

LoadText = Callable[[str], VLM]


def load_transformers(spec: str, load_text: LoadText) -> VLM:
    """Return the model of `transformers:NAME_OR_FOLDER`, or of `transformers:IMAGE_TOWER@TEXT_SPEC`.

    Weights are read as safetensors alone, no code of the folder is run, and all that the library would only warn of is
    refused: missing weights, a tokenizer that does not fit, a processor that does something else than its settings say.

    Args:
        load_text: loads the model that a text spec names.

    Raises:
        UserError: no such model, or it is refused.
    """
    place, text = files.split_sides(spec.removeprefix(files.PREFIX))
    own = files.PREFIX + place
    module = files.library()
    folder = files.model_folder(place)
    config = files.read_config(folder, own)
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise UserError(
            f"'{own}' is a model of type '{config['model_type']}'; known are {', '.join(FAMILIES)}: "
            f"{nearest(config['model_type'], FAMILIES)}"
        )
    if family.texts and text is not None:
        raise UserError(f"'{own}' has a text tower of its own: leave out '@{text}'")
    model = _load_weights(module, folder, config, family, own)
    how = read_preprocessing(module, folder, own)
    if family.texts:
        words = _load_words(module, folder, model, family, own)
        vlm: VLM = TransformersVLM(model, words, how, folder, spec=spec, config=files.config_text(config))
    else:
        side = None if text is None else load_text(text)
        vlm = _beside(model, how, side, folder, spec=spec, text=text, config=files.config_text(config))
    _try_out(vlm)
    return vlm


def _load_weights(module: Any, folder: Path, config: Mapping[str, Any], family: Family, spec: str) -> nn.Module:
    name = family.name
    if not family.texts and any(str(one).endswith(_PROJECTED) for one in config.get("architectures") or ()):
        name += _PROJECTED
    kind = getattr(module, name, None)
    if kind is None:
        raise UserError(f"'{spec}' needs {name}, which transformers {module.__version__} does not have: update it")
    options = loading_options(config["model_type"])
    try:
        with files.quiet(), same_random_state():
            try:
                model, found = kind.from_pretrained(str(folder), attn_implementation="sdpa", **options)
            except ValueError as error:  # some families have it in later versions only
                if "attention implementation" not in str(error):
                    raise
                model, found = kind.from_pretrained(str(folder), attn_implementation="eager", **options)
    except Exception as error:  # a wrong config or checkpoint fails in any way inside transformers
        raise UserError(f"'{spec}' cannot be loaded as {name}: {brief(error)}") from error
    require_whole(model, found, spec, name)
    loaded: nn.Module = model
    return loaded


def require_whole(
    model: nn.Module, found: Mapping[str, Any], spec: str, name: str, *, made: Callable[[str], bool] | None = None
) -> None:
    """Refuse a model of which the library's report `found` says that weights are missing, or that has broken ones.

    Args:
        name: its class. made: which missing weights are put in by somebody else.
    """
    missing = [key for key in found.get("missing_keys") or () if made is None or not made(str(key))]
    lost = sorted(map(str, missing)) or sorted(map(str, found.get("mismatched_keys") or ()))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"the weights of '{spec}' are no whole {name}: '{lost[0]}'{more} would be random; refused")
    # The pooler of a ViT is left out on purpose.
    if unused := [key for key in sorted(found.get("unexpected_keys") or ()) if not key.startswith("pooler.")]:
        _log.warning(
            "%d weights of '%s' are no part of %s and unused, such as '%s'", len(unused), spec, name, unused[0]
        )
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"the weights of '{spec}' are broken: '{key}' holds NaN or infinite values")


def loading_options(kind: str) -> dict[str, Any]:
    """Return how a model of a type is read by the library: safetensors from the disk alone, and no code."""
    options: dict[str, Any] = {"add_pooling_layer": False} if kind in _NO_POOLER else {}
    options |= {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    return options | {"dtype": torch.float32, "output_loading_info": True}


def read_preprocessing(module: Any, folder: Path, spec: str) -> Preprocessing:
    """Return what the processor of a folder does to images, compared with what it says; a UserError if it has none."""
    try:
        with files.quiet():
            processor = module.AutoImageProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise UserError(
            f"'{spec}' does not say how images are prepared: expected preprocessor_config.json in '{folder}' "
            f"({brief(error)})"
        ) from error
    found = preprocessing_of(processor, spec)
    with files.quiet():
        require_equal(found, processor, spec)
    return found


# The text side

_PROBES = ("a cat", "Zwölf Boxkämpfer jagen Viktor, 1986", "word " * 600)
_FILLED = 0.8  # a vocabulary may be padded to a round number of rows, or lack reserved ones


def _load_words(module: Any, folder: Path, model: Any, family: Family, spec: str) -> Words:
    files.require_tokenizer(folder, spec)
    try:
        with files.quiet():
            tokenizer = module.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise UserError(f"the tokenizer of '{spec}' cannot be read: {brief(error)}") from error
    text = model.config.text_config
    room = int(text.max_position_embeddings)
    if family.offset:
        room -= int(text.pad_token_id) + 1
    if family.mask:
        room = min(room, int(tokenizer.model_max_length))
    rows, known = int(text.vocab_size), len(tokenizer)
    if not _FILLED * rows <= known <= rows:
        raise UserError(
            f"'{spec}' has room for {rows} tokens, but its tokenizer knows {known}: put the tokenizer files that it "
            "was trained with into its folder"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of '{spec}' has no pad_token: say which in its tokenizer_config.json")
    words = Words(tokenizer, family, room, files.tokenizer_digest(folder))
    if family.end:
        _require_end(words, int(text.eos_token_id), spec)
    return words


def _require_end(words: Words, end: int, spec: str) -> None:
    """Refuse a tokenizer whose end of text is not where the text tower looks for it.

    With 2 as the config's end, which stands in all of OpenAI's, the tower takes the highest id for it.
    """
    own = words.tokenizer.eos_token_id
    for text in _PROBES:
        row = words([text])
        ids = row["input_ids"][0]
        last = int(row["attention_mask"][0].nonzero()[-1])
        seen = ids[: last + 1]
        place = int(ids.argmax()) if end == 2 and words.family.name == "CLIPModel" else _first(ids, end)
        if place != _first(ids, own) or not (seen == own).any() or place > last:
            raise UserError(
                f"the text tower of '{spec}' takes its feature at another token than the end of the text "
                f"(its tokenizer ends texts with {own}): put the tokenizer that it was trained with into its folder"
            )


def _first(ids: torch.Tensor, wanted: int) -> int:
    return int((ids == wanted).int().argmax())


# Checks of the whole


def _beside(
    tower: nn.Module, how: Preprocessing, side: VLM | None, folder: Path, *, spec: str, text: str | None, config: str
) -> TowerVLM:
    """Return an image tower beside a text side, mapped into its space where the folder holds an alignment."""
    if side is None or not (folder / files.ALIGNMENT).is_file():
        return TowerVLM(tower, how, folder, spec=spec, config=config, text=side)
    found, path = read_weights(folder / files.ALIGNMENT), folder / files.ALIGNMENT
    meant = _metadata(path).get("text")
    if meant is not None and meant != text:
        raise UserError(
            f"'{path}' leads into the space of '{meant}', not of '{text}': write {files.PREFIX}{folder}@{meant}"
        )
    weight, bias = found.get("weight"), found.get("bias")
    good = weight is not None and weight.ndim == 2 and not found.keys() - {"weight", "bias"}
    if not good or (bias is not None and weight is not None and bias.shape != weight.shape[:1]):
        raise UserError(f"'{path}' must hold weight [D_text, D_image] and may hold bias [D_text], got {sorted(found)}")
    assert weight is not None
    offset = None if bias is None else bias.float()
    return TowerVLM(
        tower,
        how,
        folder,
        spec=spec,
        config=config,
        text=side,
        weight=weight.float(),
        bias=offset,
        mapped=meant is not None,
    )


def _metadata(path: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@torch.no_grad()
def _try_out(vlm: TransformersVLM | TowerVLM | VLM) -> None:
    """Encode two images and two texts; refuse what is not finite, does not tell them apart, or is of two spaces."""
    pixels = trial_pixels(2, vlm.image_size)
    images = _rows(vlm, "an image", lambda: vlm.embed_image(pixels))
    if isinstance(vlm, TowerVLM) and vlm.text is None:
        return
    texts = _rows(vlm, "a text", lambda: vlm.embed_text(["a photo of a cat", "two dogs"]))
    if images.shape[1] != texts.shape[1]:
        raise UserError(
            f"'{vlm.spec}': image features have {images.shape[1]} dimensions, text features {texts.shape[1]}; they "
            f"must share one space ({files.ALIGNMENT} beside the image tower can map one into the other, see "
            "docs/models.md)"
        )


def _rows(vlm: VLM, what: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        found = run()
    except UserError as error:
        raise UserError(f"'{vlm.spec}': {error}") from None
    except Exception as error:  # of versions of the library with a defect, or of a config that misleads
        raise UserError(
            f"'{vlm.spec}' fails on {what} under transformers {files.library().__version__}: {brief(error)}; try its "
            "newest"
        ) from error
    if not torch.isfinite(found).all() or not found.norm(dim=-1).all():
        raise UserError(f"'{vlm.spec}' gives {what} features that are not finite, or all zero")
    if torch.equal(found[0], found[1]):
        raise UserError(
            f"'{vlm.spec}' gives two different inputs ({what} each) the same features: its weights are none"
        )
    return found
