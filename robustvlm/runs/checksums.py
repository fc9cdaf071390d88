"""Digests of what a finished run has written: its results are those of its manifest, or they are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from robustvlm.core.reading import NotRegular, read_json, require_regular
from robustvlm.errors import UserError
from robustvlm.runs.files import write_text
from robustvlm.runs.manifest import Manifest, require_shape, run_identity

NAME = "checksums.json"
FORMAT = 1

# What a run ends with. Not among them: what it goes on from (journals, checkpoints, kept features, each bound to the
# run by itself), reports, which are made again from these files, audits, which come later, and all adversarial images,
# where they were asked for: they may be many, and nothing reads them.
_FINAL = (
    "summary.json",
    "results.parquet",
    "certificates.jsonl",
    "attacked.parquet",
    "gallery",
    "training.json",
    "soup.json",
    "trees.json",
    "prompts.json",
    "prompts.safetensors",
    "immunity.json",
    "immunity.safetensors",
    "model.json",
    "weights.safetensors",
    "purifier.safetensors",
    "mapper.safetensors",
    "parts",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "bpe_merges.txt.gz",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


class _Checksums(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    run: str
    files: dict[str, str]


def write_checksums(folder: Path, manifest: Manifest) -> None:
    """Write down the digests of a run's results; the last thing that a run does before its report.

    Example:
        >>> import tempfile
        >>> folder, manifest = Path(tempfile.mkdtemp()), {"id": "1f"}
        >>> _ = (folder / "results.parquet").write_text("rows")
        >>> write_checksums(folder, manifest)
        >>> require_unchanged(folder, manifest)
        >>> _ = (folder / "results.parquet").write_text("others")
        >>> require_unchanged(folder, manifest)
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'results.parquet' in ... is not what the run wrote: ...
    """
    identity = run_identity(manifest)
    if identity is None:  # a run from before there were digests, which is continued
        return
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _final(folder)}
    content = {"format": FORMAT, "run": identity, "files": files}
    write_text(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def forget_checksums(folder: Path) -> None:
    """Take back that the results are complete, before they are written anew."""
    (folder / NAME).unlink(missing_ok=True)


def sealed(folder: Path, manifest: Manifest) -> bool:
    """Whether the digests are there; always true for runs from before there were any."""
    return run_identity(manifest) is None or (folder / NAME).is_file()


def require_unchanged(folder: Path, manifest: Manifest, *, what: str = "") -> None:
    """Refuse results that are not those that the run of this manifest wrote.

    Runs from before there were digests pass: nothing is known of theirs.

    Args:
        what: the command that goes on with the run, for the error.

    Raises:
        UserError: the run has not ended; a file is missing, changed or was not there; or all of it is another run's.
    """
    identity, path = run_identity(manifest), folder / NAME
    try:
        content = read_json(path, advice="give the run's command again")
    except FileNotFoundError:
        if identity is None:
            return
        raise UserError(f"the run '{folder}' has not ended: give its {what}command again to go on") from None
    require_shape(_Checksums, content, path)
    if content["run"] != identity:
        raise UserError(
            f"the results in '{folder}' are not those of its manifest.json: one of them was changed or is another "
            "run's; put its own back, or start over with --fresh"
        )
    known: dict[str, str] = content["files"]
    present = {found.relative_to(folder).as_posix(): found for found in _final(folder)}
    for name in sorted({*known, *present}):
        if name not in present:
            raise UserError(f"'{name}' of the run '{folder}' is gone: put it back, or {_again(name)}")
        if name not in known:
            raise UserError(f"'{name}' in '{folder}' is no file of this run: remove it")
        if _digest(present[name]) != known[name]:
            raise UserError(f"'{name}' in '{folder}' is not what the run wrote: put its own back, or {_again(name)}")


def _again(name: str) -> str:
    if name.startswith("gallery/"):
        return "start over with --fresh"
    return f"delete '{NAME}' and give the run's command again, which makes '{name}' anew"


def _final(folder: Path) -> Iterator[Path]:
    """Yield the files that digests are taken of, temporary ones left out."""
    for name in _FINAL:
        path = folder / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in inside if file.is_file() and not file.name.startswith("."))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        require_regular(path)
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except (NotRegular, OSError) as error:
        raise UserError(f"cannot read '{path}': {error}") from None
    return digest.hexdigest()
