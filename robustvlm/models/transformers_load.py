"""From `transformers:NAME_OR_FOLDER` to a model: read as safetensors, without code, whole, and tried out."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustvlm.core.boundary import same_random_state
from robustvlm.core.framing import trial_pixels
from robustvlm.errors import UserError, nearest
from robustvlm.models import transformers_files as files
from robustvlm.models.transformers_pixels import Preprocessing, preprocessing_of, require_equal
from robustvlm.models.transformers_vlm import FAMILIES, NO_POOLER, Family, TowerVLM, TransformersVLM, Words
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import brief, read_weights

_log = logging.getLogger("robustvlm")
_PROJECTED = "WithProjection"

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
    options: dict[str, Any] = {"add_pooling_layer": False} if kind in NO_POOLER else {}
    options |= {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    return options | {"dtype": torch.float32, "output_loading_info": True}


def read_preprocessing(module: Any, folder: Path, spec: str) -> Preprocessing:
    """Return what the processor of a folder does to images, compared with what it says; a UserError if it has none."""
    return checked_preprocessing(read_image_processor(module, folder, spec), spec)


def checked_preprocessing(processor: Any, spec: str) -> Preprocessing:
    """Return what an image processor says that it does, compared with what it does."""
    found = preprocessing_of(processor, spec)
    with files.quiet():
        require_equal(found, processor, spec)
    return found


def read_image_processor(module: Any, folder: Path, spec: str, settings: Mapping[str, bool] | None = None) -> Any:
    """Return the image processor of a folder; a UserError if it has none.

    Args:
        settings: that are put in the place of the processor's own.
    """
    try:
        with files.quiet():
            return module.AutoImageProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **(settings or {})
            )
    except Exception as error:
        raise UserError(
            f"'{spec}' does not say how images are prepared: expected preprocessor_config.json in '{folder}' "
            f"({brief(error)})"
        ) from error


def read_tokenizer(module: Any, folder: Path, spec: str) -> Any:
    """Return the tokenizer of a folder, read without code of the folder; a UserError if it has none that is whole."""
    files.require_tokenizer(folder, spec)
    try:
        with files.quiet():
            return module.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file fails in any way inside transformers
        raise UserError(f"the tokenizer of '{spec}' cannot be read: {brief(error)}") from error


# The text side

_PROBES = ("a cat", "Zwölf Boxkämpfer jagen Viktor, 1986", "word " * 600)
_FILLED = 0.8  # a vocabulary may be padded to a round number of rows, or lack reserved ones


def _load_words(module: Any, folder: Path, model: Any, family: Family, spec: str) -> Words:
    tokenizer = read_tokenizer(module, folder, spec)
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
