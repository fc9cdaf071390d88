"""open_clip models as VLMs, loaded by name, folder or hub, and written as a folder that needs nothing else."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robustvlm.core.files import replacing, write_text
from robustvlm.core.side_effects import same_random_state
from robustvlm.errors import MissingExtra, UserError
from robustvlm.models import clip_inputs
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES, brief, fit_weights, hub_file, read_weights

# open_clip models as VLMs: architecture by name, folder or hub, weights read safely, preprocessing inside

_FOLDER = "local-dir:"
# Token ids of these tell tokenizers apart in a fingerprint.
_PROBES = ["a photo of a border collie, 1986", "Zwölf Boxkämpfer jagen Viktor", "\N{GRINNING FACE} don't!"]


class ClipVLM(VLM):
    """An open_clip model with its tokenizer and the preprocessing it was trained with."""

    model: Any  # open_clip's classes share encode_image, encode_text, visual and logit_scale, but no typed base
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Any, tokenizer: clip_inputs.Tokenizer, *, spec: str, architecture: str = "") -> None:
        framing, mean, std = clip_inputs.preprocessing_of(model.visual.preprocess_cfg, spec)
        super().__init__(spec=spec, logit_scale=float(model.logit_scale.detach().exp()), **framing.options())
        self.model = model
        self.tokenizer = tokenizer
        self.architecture = architecture
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
        # A token is at least one byte long, so most texts need no second look.
        return [self._cut(text, room) if len(text.encode("utf-8", "replace")) > room - 2 else 0 for text in texts]

    def _cut(self, text: str, room: int) -> int:
        encode = getattr(self.tokenizer, "encode", None)
        if callable(encode):
            return max(0, len(encode(text)) + 2 - room)  # with the tokens that begin and end a text
        # Of other tokenizers we know only whether another word would still be read.
        read, longer = self.tokenizer([text, f"{text} {text[-1:]}x"])
        return int(torch.equal(read, longer))

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
) -> ClipVLM:
    """Return the open_clip model that `source` describes, with the weights of a local file.

    `source` is what open_clip takes: an architecture's name or `local-dir:FOLDER`; `preprocess` overrides what it says
    of the preprocessing. Raises UserError when the config is broken or unknown in a part, when the weights or the
    tokenizer do not fit, or when open_clip would bring images to the model in another way than this program does.
    """
    import open_clip

    try:
        if source.startswith(_FOLDER):
            clip_inputs.check_settings(Path(source.removeprefix(_FOLDER)), spec)
        config = open_clip.get_model_config(source)
        _check_text_config(config["text_cfg"], spec, tokenizer_inside=(tokenizer_source or source).startswith(_FOLDER))
        values = read_weights(weights)
        with _quiet(), same_random_state():
            model = open_clip.create_model(
                source,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=clip_inputs.settings_of(preprocess or {}),
            )
            tokenizer = clip_inputs.load_tokenizer(tokenizer_source or source, source, spec)
        vlm = ClipVLM(model, tokenizer, spec=spec, architecture=_architecture(config, quick_gelu))
        clip_inputs.require_equal(vlm.framing, vlm.mean, vlm.std, model.visual.preprocess_cfg, spec)
    except UserError:
        raise
    except ImportError as error:  # open_clip asks for transformers only where a config needs it
        raise MissingExtra(error.name or "transformers", extra="hub") from error
    except Exception as error:  # a wrong config fails in any way inside open_clip, torch or timm
        raise UserError(f"model '{spec}' cannot be built from its config: {brief(error)}") from error
    fit_weights(model, values, what=f"'{weights}'")
    clip_inputs.check_vocabulary(tokenizer, model, config["text_cfg"], spec)
    # The temperature is one of the weights that have just been read.
    vlm.logit_scale = float(model.logit_scale.detach().exp())
    return vlm


def _architecture(config: dict[str, Any], quick_gelu: bool) -> str:
    """Return the config as text; where the merges file lies is no part of what the model is."""
    kwargs = config["text_cfg"].get("tokenizer_kwargs")
    if kwargs and kwargs.pop("bpe_path", None) and not kwargs:
        del config["text_cfg"]["tokenizer_kwargs"]
    return json.dumps([config, quick_gelu], sort_keys=True, default=str)


def _check_text_config(text: dict[str, Any], spec: str, *, tokenizer_inside: bool) -> None:
    """Refuse configs that would run code, and fail at once where a part on the hub is out of reach."""
    # open_clip hands these to transformers as they stand.
    if text.get("tokenizer_kwargs", {}).get("trust_remote_code"):
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


# Writing an open_clip model as a folder that needs nothing else: config, weights, tokenizer

MERGES = "bpe_merges.txt.gz"


def write_clip_folder(
    vlm: ClipVLM, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None, half: bool = False
) -> None:
    """Write `vlm` as open_clip reads it (`local-dir:FOLDER`), each file atomically.

    open_clip takes the path of a merges file as it stands, so a tokenizer that is not CLIP's own is named by where the
    folder lies now; this program finds the file beside the config wherever the folder goes.

    Args:
        state: weights under the names of the open_clip model; default: the model's own.
        half: store floating-point weights with 16 bits; they are widened again when read.

    Raises:
        UserError: the model's tokenizer is of a kind that cannot be written.

    Example:
        >>> import tempfile
        >>> from robustvlm.models import load_model
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_clip_folder(load_model("tiny"), folder)
        >>> load_model(str(folder)).fingerprint == load_model("tiny").fingerprint
        True
        >>> sorted(path.name for path in folder.iterdir())
        ['bpe_merges.txt.gz', 'open_clip_config.json', 'open_clip_model.safetensors']
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = _write_tokenizer(vlm, folder)
    values = stored_weights(state or vlm.model.state_dict(), half=half)
    with replacing(folder / WEIGHT_NAMES[0]) as temporary:
        save_file(values, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG_NAME, json.dumps(clip_config(vlm, merges), indent=2) + "\n")


def stored_weights(state: Mapping[str, torch.Tensor], *, half: bool = False) -> dict[str, torch.Tensor]:
    """Return weights as they are written: on the CPU, each with memory of its own, with 16 bits if `half`."""
    return {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in state.items()
    }


def clip_config(vlm: ClipVLM, merges: Path | None = None) -> dict[str, Any]:
    """Return what `open_clip_config.json` holds: architecture and preprocessing, without anything to fetch."""
    config, quick_gelu = json.loads(vlm.architecture)
    if merges is not None:
        config["text_cfg"]["tokenizer_kwargs"] = {
            **(config["text_cfg"].get("tokenizer_kwargs") or {}),
            "bpe_path": str(merges.resolve()),
        }
    if quick_gelu:
        config["quick_gelu"] = True
    if "timm_model_pretrained" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    return {"model_cfg": config, "preprocess_cfg": clip_inputs.settings_of(vlm.model.visual.preprocess_cfg)}


def _write_tokenizer(vlm: ClipVLM, folder: Path) -> Path | None:
    """Write the tokenizer, unless it is CLIP's own, which open_clip carries; return the merges file, if any."""
    import open_clip

    tokenizer: Any = vlm.tokenizer
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        if tokenizer.bpe_ranks != open_clip.SimpleTokenizer().bpe_ranks:
            lines = ["merges", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
            with replacing(folder / MERGES) as temporary:
                # No time and no name inside: the same tokenizer gives the same bytes.
                temporary.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
            return folder / MERGES
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    else:
        raise UserError(f"the tokenizer of '{vlm.spec}' is a {type(tokenizer).__name__}, which cannot be stored")
    return None
