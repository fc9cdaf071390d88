"""open_clip models as VLMs: what they take, loaded by name, folder or hub."""

import dataclasses
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from robustvlm.core.boundary import same_random_state
from robustvlm.core.files import MOST_BYTES, NotRegular, read_object, require_regular
from robustvlm.core.framing import RESIZE_MODES, Framing, to_pixels
from robustvlm.core.loading import quick_imports
from robustvlm.core.size import Size, as_size, size_text
from robustvlm.errors import MissingExtra, UserError, nearest
from robustvlm.models.checkpoints import find_weights, fit_weights
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import CONFIG_NAME, brief, hub_file, read_checkpoint

# What an open_clip config says of preprocessing: read as open_clip reads it, and compared with its own

TEXT_PARTS = ("model_cfg", "model_cfg.text_cfg", "model_cfg.text_cfg.tokenizer_kwargs")
"""Where a folder's config says what its text side is."""
KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What a config or a tag may say, beside the size, which is the model's own."""
_FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
# Below this share of the largest value two pipelines differ by rounding only; one grey level is 4e-3.
_ROUNDING = 1e-4


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing part of a tag's or model's config, without what it leaves open.

    Example:
        >>> settings_of({"hf_hub": "timm/x/", "resize_mode": "squash", "mean": None})
        {'resize_mode': 'squash'}
    """
    return {key: config[key] for key in KEYS if config.get(key) is not None}


def check_settings(folder: Path, spec: str) -> None:
    """Refuse a folder whose `preprocess_cfg` has keys that open_clip would drop without a word."""
    from open_clip.transform import PreprocessCfg

    content = read_object(folder / CONFIG_NAME, parts=("preprocess_cfg", *TEXT_PARTS))
    found = content.get("preprocess_cfg") or {}
    known = {field.name for field in dataclasses.fields(PreprocessCfg)}
    for key, value in found.items():
        if key not in known and value is not None:
            raise UserError(
                f"preprocess_cfg of model '{spec}' has '{key}', which open_clip does not know: take it out of the "
                f"config if it changes nothing; {nearest(key, known)}"
            )
    if found.get("mode") not in (None, "RGB"):
        raise UserError(
            f"preprocess_cfg of model '{spec}' asks for images of mode {found['mode']!r}: only RGB is known"
        )


def preprocessing_of(config: Mapping[str, Any], spec: str) -> tuple[Framing, tuple[float, ...], tuple[float, ...]]:
    """Return how images are framed, and the mean and standard deviation of the channels.

    Raises:
        UserError: a value that open_clip does not know, or an image size that is none.

    Example:
        >>> config = {"size": 32, "mean": 0.5, "std": [0.5], "interpolation": "random", "resize_mode": "squash"}
        >>> preprocessing_of(config, "m")[1:]
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    interpolation, mode = config.get("interpolation") or "bicubic", config.get("resize_mode") or "shortest"
    if interpolation not in _FILTERS:
        hint = nearest(str(interpolation), _FILTERS)
        raise UserError(f"preprocess_cfg of model '{spec}' has the unknown interpolation '{interpolation}': {hint}")
    if mode not in RESIZE_MODES:
        hint = nearest(str(mode), RESIZE_MODES)
        raise UserError(f"preprocess_cfg of model '{spec}' has the unknown resize_mode '{mode}': {hint}")
    # open_clip evaluates with bicubic where the training config says "random".
    size, filter_ = _size(config["size"], spec), _FILTERS[interpolation]
    if mode == "shortest" and not isinstance(size, int):
        filter_ = "bicubic"  # so does open_clip where the sides differ, whatever the config says
    framing = Framing(size, filter_, mode, config.get("fill_color") or 0)
    mean = _channels(config.get("mean"), OPENAI_DATASET_MEAN, "mean", spec)
    return framing, mean, _channels(config.get("std"), OPENAI_DATASET_STD, "std", spec)


def require_equal(
    framing: Framing, mean: torch.Tensor, std: torch.Tensor, config: Mapping[str, Any], spec: str
) -> None:
    """Refuse a model for which open_clip's own transform gives other values than ours, on a wide and on a tall image.

    Whatever a config or a later open_clip may come to mean, no model is shown other pixels without a word.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    require_same_pixels(theirs, framing, mean, std, spec, "open_clip")


def require_same_pixels(
    theirs: Callable[[Image.Image], Any], framing: Framing, mean: torch.Tensor, std: torch.Tensor, spec: str, whose: str
) -> None:
    """Refuse a model for which the transform of the library that it is from gives other values than ours."""
    for width, height in ((96, 41), (37, 80)):
        grid = np.add.outer(np.arange(height) * 7, np.arange(width) * 5)
        image = Image.fromarray(np.stack([grid, grid * 3 + 1, grid // 2], axis=-1).astype(np.uint8))
        wanted = theirs(image)
        got = ((to_pixels(image, framing)[None] - mean.cpu()) / std.cpu())[0]
        if wanted.shape != got.shape or (wanted - got).abs().max() > _ROUNDING * wanted.abs().max().clamp_min(1):
            raise UserError(
                f"the preprocessing of model '{spec}' ({framing.resize_mode}, {framing.interpolation}, "
                f"{size_text(framing.image_size)} pixels) gives other pixels than this release of {whose} does: use "
                "another one"
            )


def _channels(value: Any, default: tuple[float, ...], name: str, spec: str) -> tuple[float, ...]:
    """Return three values: a number counts for every channel, nothing stands for CLIP's own."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return tuple(default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and np.isfinite(v) for v in values)
    if not numbers or len(values) not in (1, 3) or (name == "std" and not all(v > 0 for v in values)):
        raise UserError(f"preprocess_cfg of model '{spec}' needs 3 numbers as {name}, got {value!r}")
    if value == 0:
        # open_clip takes a bare zero for "not given", and CLIP's own mean instead.
        raise UserError(
            f"preprocess_cfg of model '{spec}' has {name} {value!r}: write [{value!r}, {value!r}, {value!r}]"
        )
    return tuple(float(v) for v in values) * (3 // len(values))


def _size(size: Any, spec: str) -> Size:
    one = size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size
    return as_size(one, f"model '{spec}': size of preprocess_cfg")


# The tokenizer of an open_clip model: its own merges file where it has one, and whether it fits the text tower

Tokenizer = Callable[[list[str]], torch.Tensor]
_FOLDER = "local-dir:"
# A vocabulary of transformers may be padded to a round number of rows, or lack reserved ones; CLIPA's fills 95 %.
_FILLED = 0.8
MERGES = "bpe_merges.txt.gz"


def load_tokenizer(source: str, folder_source: str, spec: str) -> Tokenizer:
    """Return open_clip's tokenizer for `source`, with the merges file of the model's folder if that has one.

    Raises UserError when the merges file is damaged, or when several lie there and the config names none.
    """
    import open_clip

    bpe = bpe_file(Path(folder_source.removeprefix(_FOLDER)), spec) if folder_source.startswith(_FOLDER) else None
    if bpe is not None:
        _check_merges(bpe, spec)
    # open_clip takes a merges file's path as it stands, so the folder has to be part of it.
    return open_clip.get_tokenizer(source, **({"bpe_path": str(bpe)} if bpe else {}))


def bpe_file(folder: Path, spec: str) -> Path | None:
    """Return the merges file of a model folder: the one its config names, else the only bpe_*.txt.gz beside it."""
    config = read_object(folder / CONFIG_NAME, parts=TEXT_PARTS)
    text = (config.get("model_cfg") or {}).get("text_cfg") or {}
    named = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if named:
        # A folder that was moved, or came from another machine, has the file beside its config.
        return next((path for path in (folder / Path(named).name, folder / named) if path.is_file()), folder / named)
    if text.get("hf_tokenizer_name"):
        return None
    found = sorted(folder.glob("bpe_*.txt.gz"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"model '{spec}' has several merges files ({names}): name one as text_cfg.tokenizer_kwargs.bpe_path"
        )
    return found[0] if found else None


def _check_merges(path: Path, spec: str) -> None:
    try:
        require_regular(path)
        with gzip.open(path) as file:
            if len(content := file.read(MOST_BYTES + 1)) > MOST_BYTES:
                raise NotRegular("it unpacks to more than any merges file holds")
        content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"model '{spec}' names the merges file '{path}', which is not there") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"the merges file '{path}' of model '{spec}' is damaged ({error}): fetch it again") from None


def check_vocabulary(tokenizer: Tokenizer, model: Any, text: dict[str, Any], spec: str) -> None:
    """Refuse a tokenizer that knows more tokens than the text tower, or fewer than it was trained with.

    A merges file that is cut short reads well and numbers every token anew. CLIP's own kind of tokenizer has to fit
    exactly; a vocabulary of transformers may leave a part of the rows unused.
    """
    room = _rows(model, text)
    ids = getattr(tokenizer, "encoder", None)
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(ids, dict) and ids:
        known, least = max(ids.values()) + 1, room
    elif inner is not None and hasattr(inner, "__len__"):
        known, least = len(inner), int(_FILLED * room)
    else:
        return
    if known > room or known < least:
        remedy = (
            "put the merges file it was trained with beside its config as bpe_NAME.txt.gz"
            if isinstance(ids, dict)
            else "put the tokenizer files it was trained with beside its config"
        )
        raise UserError(f"model '{spec}' has room for {room} tokens, but its tokenizer knows {known}: {remedy}")


def _rows(model: Any, text: dict[str, Any]) -> int:
    """Return the number of token embeddings of the text tower."""
    embeddings = getattr(getattr(getattr(model, "text", None), "transformer", None), "get_input_embeddings", None)
    if text.get("hf_model_name") and callable(embeddings):
        return len(embeddings().weight)
    return int(text.get("vocab_size", 49408))


# open_clip models as VLMs: architecture by name, folder or hub, weights read safely, preprocessing inside

# Cleaning may spell one sign out as many: U+FDFA, of three bytes, as 18 letters of two. ASCII it leaves alone, but for
# entities of HTML.
_MOST_TOKENS_A_BYTE = 12


def _most_tokens(text: str) -> int:
    """Return how many tokens a text makes at most: one a byte of what cleaning may make of it."""
    plain = text.isascii() and "&" not in text
    return len(text) if plain else _MOST_TOKENS_A_BYTE * len(text.encode("utf-8", "replace"))


# Token ids of these tell tokenizers apart in a fingerprint.
_PROBES = ["a photo of a border collie, 1986", "Zwölf Boxkämpfer jagen Viktor", "\N{GRINNING FACE} don't!"]


_NOT_OF_TEXTS = ("visual.", "logit_scale", "logit_bias")


class ClipVLM(VLM):
    """An open_clip model with its tokenizer and the preprocessing it was trained with.

    `logit_bias` is what the sigmoid loss adds to every logit, None without one. It changes neither softmax nor
    prediction and is left out of the logits.
    """

    model: Any  # open_clip's classes share encode_image, encode_text, visual and logit_scale, but no typed base
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Any, tokenizer: Tokenizer, *, spec: str, architecture: str = "") -> None:
        framing, mean, std = preprocessing_of(model.visual.preprocess_cfg, spec)
        super().__init__(spec=spec, logit_scale=float(model.logit_scale.detach().exp()), **framing.options())
        self.model = model
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.logit_bias: float | None = None
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image((pixels - self.mean) / self.std)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length."""
        room = self.tokenizer([""]).shape[1]
        # Most texts need no second look: so many tokens fit, with the three that a tokenizer adds at most.
        return [self._cut(text, room) if _most_tokens(text) > room - 3 else 0 for text in texts]

    def _cut(self, text: str, room: int) -> int:
        encode = getattr(self.tokenizer, "encode", None)
        if callable(encode):
            return max(0, len(encode(text)) + 2 - room)  # with the tokens that begin and end a text
        inner, clean = getattr(self.tokenizer, "tokenizer", None), getattr(self.tokenizer, "clean_fn", None)
        if callable(inner) and callable(clean) and not getattr(self.tokenizer, "tokenizer_mode", ""):  # of transformers
            return max(0, len(inner(clean(text), verbose=False)["input_ids"]) - room)
        # Of others (SigLIP's; those with a class token last) the same text in a context that holds it all tells. What
        # fills an empty text's is none of its tokens.
        ample = room + _most_tokens(text)
        try:
            empty, whole = self.tokenizer(["", text], context_length=ample)  # type: ignore[call-arg]
        except TypeError:  # one's own that takes no length
            empty = whole = self.tokenizer([""])[0]
        if len(whole) != ample:  # we know only whether another word would still be read
            read, longer = self.tokenizer([text, f"{text} {text[-1:]}x"])
            return int(torch.equal(read, longer))
        filler = empty.mode().values
        return int((whole != filler).sum() - (self.tokenizer([text])[0] != filler).sum())

    @property
    def text_fingerprint(self) -> str:
        """Digest of the text tower and the tokenizer: models whose image tower alone was trained share it."""
        texts = {name: value for name, value in self.model.state_dict().items() if not name.startswith(_NOT_OF_TEXTS)}
        config, quick_gelu = json.loads(self.architecture or "[{}, false]")
        config.pop("vision_cfg", None)
        quick_gelu = bool(config.pop("quick_gelu", False)) or quick_gelu  # where a saved folder says it
        design = json.dumps([config, quick_gelu], sort_keys=True)
        return self._digest("text", texts, ("text", design, str(self.tokenizer(_PROBES).tolist())))

    def _identity(self) -> Iterable[str]:
        return self.architecture, str(self.tokenizer(_PROBES).tolist())


def build_clip(
    source: str,
    weights: Path,
    *,
    spec: str,
    preprocess: dict[str, Any] | None = None,
    quick_gelu: bool = False,
    tokenizer_source: str | None = None,
    part: str | None = None,
) -> ClipVLM:
    """Return the open_clip model that `source` describes, with the weights of a local file.

    `source` is what open_clip takes: an architecture's name or `local-dir:FOLDER`; `preprocess` overrides what it says
    of the preprocessing; `part` names the weights to take of a file with several. Raises UserError when the config is
    broken or unknown in a part, when the weights or the tokenizer do not fit, or when open_clip would bring images to
    the model in another way than this program does.
    """
    with quick_imports():
        import open_clip

    try:
        if source.startswith(_FOLDER):
            check_settings(Path(source.removeprefix(_FOLDER)), spec)
        config = open_clip.get_model_config(source)
        _check_text_config(config["text_cfg"], spec, tokenizer_inside=(tokenizer_source or source).startswith(_FOLDER))
        content = read_checkpoint(weights)
        with _quiet(), same_random_state():
            model = open_clip.create_model(
                source,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=settings_of(preprocess or {}),
            )
            tokenizer = load_tokenizer(tokenizer_source or source, source, spec)
        vlm = ClipVLM(model, tokenizer, spec=spec, architecture=_architecture(config, quick_gelu))
        require_equal(vlm.framing, vlm.mean, vlm.std, model.visual.preprocess_cfg, spec)
    except UserError:
        raise
    except ImportError as error:  # open_clip asks for transformers only where a config needs it
        raise MissingExtra(error.name or "transformers", extra="hub") from error
    except Exception as error:  # a wrong config fails in any way inside open_clip, torch or timm
        raise UserError(f"model '{spec}' cannot be built from its config: {brief(error)}") from error
    found = fit_weights(model, content, what=f"'{weights}'", part=part)
    check_vocabulary(tokenizer, model, config["text_cfg"], spec)
    _take_temperature(vlm, found.logit_bias)
    return vlm


def put_tower(vlm: ClipVLM, weights: Path, *, spec: str, part: str | None = None) -> None:
    """Replace one tower of a model by that of a file which holds no more, and name the model `spec`.

    Raises UserError when the file holds another tower, or a whole model.
    """
    found = find_weights(vlm.model, read_checkpoint(weights), what=f"'{weights}'", part=part)
    if found.tower is None:
        raise UserError(f"'{weights}' holds a whole model: leave out '@{vlm.spec}', nothing of which would be used")
    vlm.model.load_state_dict(found.weights, strict=False)
    vlm.spec = spec
    _take_temperature(vlm, found.logit_bias if "logit_scale" in found.weights else vlm.logit_bias)


def _take_temperature(vlm: ClipVLM, bias: float | None) -> None:
    """Read the temperature, which is one of the weights, and the bias, which most models have no place for."""
    own = getattr(vlm.model, "logit_bias", None)
    vlm.logit_scale = float(vlm.model.logit_scale.detach().exp())
    vlm.logit_bias = bias if own is None else float(own.detach())


def _architecture(config: dict[str, Any], quick_gelu: bool) -> str:
    """Return the config as text; where the merges file lies is no part of what the model is."""
    kwargs = config["text_cfg"].get("tokenizer_kwargs")
    if kwargs and kwargs.pop("bpe_path", None) and not kwargs:
        del config["text_cfg"]["tokenizer_kwargs"]
    return json.dumps([config, quick_gelu], sort_keys=True, default=str)


def _check_text_config(text: dict[str, Any], spec: str, *, tokenizer_inside: bool) -> None:
    """Refuse configs that would run code, and fail at once where a part on the hub is out of reach."""
    # open_clip hands these to transformers as they stand.
    if (text.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise UserError(
            f"the config of model '{spec}' asks to run code from its repository (trust_remote_code): refused"
        )
    advice = f"the text part of '{spec}' comes from there; check the network, or pass a folder that holds its tokenizer"
    if text.get("hf_model_name"):
        hub_file(text["hf_model_name"], ["config.json"], advice=advice)
    if text.get("hf_tokenizer_name") and not tokenizer_inside:
        hub_file(text["hf_tokenizer_name"], ["tokenizer_config.json", "tokenizer.json", "config.json"], advice=advice)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's notes on the root logger ("no weights loaded": they are loaded afterwards, by us)."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
