"""Writing an open_clip model as a folder that needs nothing else: config, weights, tokenizer."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robustvlm.core.files import replacing, write_text
from robustvlm.errors import UserError
from robustvlm.models.clip import MERGES, ClipVLM, settings_of
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES, stored_weights


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
    return {"model_cfg": config, "preprocess_cfg": settings_of(vlm.model.visual.preprocess_cfg)}


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
