"""Fetching checkpoints from the Hugging Face hub, cached copies first, with one clear error where that fails."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from robustvlm.core.foreign_text import without_secrets
from robustvlm.core.network import download_seconds, within
from robustvlm.errors import UserError

CONFIG_NAME = "open_clip_config.json"
_SHORT = 30.0  # seconds for one question to the hub
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


def hub_file(repo: str, names: Sequence[str], *, advice: str) -> Path:
    """Return a local path of the first file of `names` that the hub repository has; a cached copy needs no network.

    Raises UserError that ends in `advice` when nothing can be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    try:
        cached = [try_to_load_from_cache(repo, name) for name in names]
        for path in cached:
            if isinstance(path, str):
                return Path(path)
        _reach_hub()
        for name in names:
            try:
                return Path(within(download_seconds(), partial(hf_hub_download, repo, name)))
            except EntryNotFoundError:
                continue
    except Exception as error:  # the hub's client raises its own, its transport's and ValueErrors for bad names
        raise UserError(f"could not fetch '{repo}' from the Hugging Face hub ({brief(error)}): {advice}") from error
    raise UserError(f"'{repo}' on the Hugging Face hub has none of the files {', '.join(names)}: {advice}")


def tag_file(tag: dict[str, Any], *, advice: str) -> Path:
    """Return a local path of the weights that an open_clip pretrained tag's config names."""
    location = str(tag.get("hf_hub") or "")
    if location:
        repo, _, name = location.rpartition("/")
        safe = Path(name).with_suffix(".safetensors").name if name else ""
        return hub_file(repo, [safe, name] if name else WEIGHT_NAMES, advice=advice)
    from open_clip.pretrained import download_pretrained

    try:
        return Path(within(download_seconds(), partial(download_pretrained, tag)))
    except Exception as error:  # urllib's, the checksum's RuntimeError
        raise UserError(f"could not fetch '{tag.get('url')}' ({brief(error)}): {advice}") from error


def _reach_hub() -> None:
    # The client itself retries each of several files for half a minute; one short question fails at once.
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    within(_SHORT, lambda: get_session().head(ENDPOINT, timeout=10))


def brief(error: BaseException, *, limit: int = 160) -> str:
    """Return the first line of an error, cut to `limit` characters; its type where it says nothing.

    Example:
        >>> brief(ValueError("no such thing\\nand a long story"))
        'no such thing'
        >>> brief(KeyError())
        'KeyError'
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = without_secrets(line)
    return line if len(line) <= limit else line[: limit - 3] + "..."
