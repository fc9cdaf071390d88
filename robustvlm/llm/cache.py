"""Answers kept on disk, so that the same question to the same model is paid for once and answered alike every time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from robustvlm.runs.files import write_text

_FORMAT = 1


def answer_key(parts: Sequence[str]) -> str:
    """Return a digest of all that decides an answer, each part told apart from its neighbours.

    Example:
        >>> answer_key(["ab", "c"]) == answer_key(["a", "bc"])
        False
    """
    text = json.dumps([_FORMAT, *parts]).encode()
    return hashlib.blake2b(text, digest_size=20).hexdigest()


def default_folder() -> Path:
    """Return where answers are kept unless another folder is named."""
    return Path(platformdirs.user_cache_dir("robustvlm")) / "llm"


class AnswerCache:
    """A folder with one JSON file an answer: what was asked of which model, and what it said.

    A folder that cannot be written to costs only the requests saved; a damaged file counts as none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> str | None:
        """Return the answer kept under `key`, as JSON text, or None."""
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return json.dumps(content["answer"]) if content["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, answer: str, *, model: str, prompt: str) -> None:
        """Keep an answer, JSON text, under `key`; model and prompt are for people who look into the file."""
        content = {"format": _FORMAT, "model": model, "prompt": prompt, "answer": json.loads(answer)}
        with contextlib.suppress(OSError):
            write_text(self._path(key), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
