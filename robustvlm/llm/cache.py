"""Answers kept on disk, so that the same question to the same model is paid for once and answered alike every time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
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

    A folder that cannot be written to costs only the requests saved; a damaged file counts as none. Prompts and answers
    are the user's own: only the owner may read them, and files that somebody else could have written are not believed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> str | None:
        """Return the answer kept under `key`, as JSON text, or None."""
        try:
            if not self._ours(self.folder) or not self._ours(self._path(key)):
                return None
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return json.dumps(content["answer"]) if content["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, answer: str, *, model: str, prompt: str) -> None:
        """Keep an answer, JSON text, under `key`; model and prompt are for people who look into the file."""
        content = {"format": _FORMAT, "model": model, "prompt": prompt, "answer": json.loads(answer)}
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._ours(self.folder):
                write_text(self._path(key), json.dumps(content, indent=1, ensure_ascii=False) + "\n", private=True)

    def _ours(self, path: Path) -> bool:
        """Whether a file or folder is this user's and nobody else could write to it; what others may read is closed."""
        if not hasattr(os, "getuid"):  # Windows: the user's own cache folder is closed to others
            return True
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
            return False
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
        return not stat.S_IMODE(found.st_mode) & 0o022

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
