"""The manifest: what was run, with what, on what; and digests by which its results are known to be its own."""

import datetime
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from robustvlm.core.files import NotRegular, read_json, require_regular, write_text
from robustvlm.errors import UserError
from robustvlm.runs.tools import describe_device, git_commit, versions
from robustvlm.text import secrets_cut

# The manifest: what was run, with what, on what; and whether a run on disk may be continued

FORMAT = 1

Manifest = dict[str, Any]

NAME = "manifest.json"
TRACKED = "tensorboard"
"""The folder that --track tensorboard writes, in the run's own."""
_DEFINING = ("format", "kind", "id", "created", "config", "model", "data", "probe")
"""What makes a run this run and no other."""


def make_manifest(
    *,
    kind: str,
    name: str,
    command: str,
    config: BaseModel | Mapping[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
    probe: dict[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a new run of any kind, without the passwords and signatures of URLs.

    Args:
        config: every setting that decides the results, its `device` among them.
        model, data: spec, fingerprint and what else describes them.
        probe: what the model answers to fixed inputs (`robustvlm.models.probe`); compared apart from the settings,
            within its tolerance, and no part of a run's name.
    """
    settings = config.model_dump() if isinstance(config, BaseModel) else dict(config)
    manifest: Manifest = {
        "id": uuid.uuid4().hex,
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": settings,
        "versions": versions(),
        "device": describe_device(str(settings.get("device", "cpu"))),
        "git_commit": git_commit(),
        "model": model,
        "data": data,
    }
    cut: Manifest = secrets_cut(manifest if probe is None else manifest | {"probe": probe})
    return cut


def require_text(manifest: Manifest) -> None:
    """Refuse file names that are no text, as Linux allows: they could not be written down in any file of the run."""
    try:
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(error.object[max(0, error.start - 30) : error.end + 10])
        raise UserError(f"a path or name in the settings is not valid text (UTF-8), near {shown}: rename it") from None


def read_manifest(path: Path, *, advice: str = "") -> Manifest:
    """Return the manifest at a path, after a look at its shape.

    Raises:
        FileNotFoundError: there is none. UserError: it is damaged, or another program's.
    """
    content = read_json(path, advice=advice)
    more = f": {advice}" if advice else ""
    if not is_manifest(content):
        raise UserError(f"'{path}' is not the manifest of a run{more}")
    require_shape(_Shape, content, path, more)
    return dict(content)


def kind_of_run(folder: Path) -> str | None:
    """Return the kind that a folder's manifest names; None where there is no manifest that can be read."""
    try:
        content = read_json(folder / NAME)
    except (OSError, UserError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def trained_on_attacks(manifest: Mapping[str, Any]) -> bool:
    """Whether the images that a run trained on were attacked, by the attack of its settings.

    Example:
        >>> trained_on_attacks({"kind": "finetune", "config": {"method": "clean", "inner_steps": 3}})
        False
    """
    config = manifest.get("config") or {}
    if manifest.get("kind") == "finetune":
        return bool(manifest.get("attacked", config.get("method") != "clean"))
    return manifest.get("kind") == "purify" and config.get("eps") is not None


def run_identity(manifest: Manifest) -> str | None:
    """Return a digest of all that makes a run this one; its journals and results carry it.

    None for runs from before there were identities, whose files carry nothing.

    Example:
        >>> base = {"format": 1, "kind": "attack", "id": "1f", "config": {"seed": 0}}
        >>> run_identity(base) == run_identity(base | {"config": {"seed": 1}}), run_identity({"format": 1})
        (False, None)
    """
    if manifest.get("id") is None:
        return None
    text = json.dumps({key: manifest.get(key) for key in _DEFINING}, default=str)
    plain = json.dumps(json.loads(text), sort_keys=True)  # keys as a file would hold them
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def carried(manifest: Manifest) -> dict[str, str]:
    """Return what a file of a run's folder has to say of its run, under "run"; `require_owner` compares it.

    Example:
        >>> carried({"format": 1})
        {}
    """
    identity = run_identity(manifest)
    return {} if identity is None else {"run": identity}


def require_owner(found: str | None, manifest: Manifest, path: Path, *, old: bool = True) -> None:
    """Refuse a file of a run's folder that does not carry the run's identity.

    Args:
        found: the identity that the file carries, None for none.
        old: accept a file without one in a run from before there were identities.

    Raises:
        UserError: the file is another run's, or nothing shows that it is this one's.
    """
    identity = run_identity(manifest)
    if found != identity or (found is None and not old):
        whose = "another run's" if found is not None else "not known to be of this run"
        raise UserError(
            f"'{path}' is {whose}: put the run's own file back, or give the run's command with --fresh or another "
            "--name"
        )


class _Names(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Names):
    spec: str | None = None
    fingerprint: str | None = None


class _Level(_Names):
    tree: str
    level: int
    of: list[int]


class _Data(_Names):
    spec: str | None = None
    fingerprint: str | None = None
    images: int | None = None
    class_names: list[str] = []
    templates: list[str] = []
    superclasses: dict[str, str] | None = None
    levels: list[_Level] | None = None


class _Plan(_Names):
    statement: str = ""
    theorem: str = ""
    bound: str = ""
    stop_rule: str = ""
    notes: list[str] = []
    threat: list[str] = []
    best_radius: float = 0.0


class _Session(_Names):
    versions: dict[str, str] = {}
    git_commit: str | None = None


class _Shape(_Names):
    """What every reader of a manifest may rely on."""

    format: int
    kind: str
    id: str | None = None
    name: str | None = None
    command: str | None = None
    created: str | None = None
    device: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] = {}
    sessions: list[_Session] = []
    config: dict[str, Any]
    model: _Model | None = None
    data: _Data | None = None
    plan: _Plan | None = None
    probe: dict[str, Any] | None = None
    named_files: dict[str, str] | None = None


def require_shape(shape: type[BaseModel], content: object, path: Path, more: str = "") -> None:
    """Refuse a parsed file whose parts are not of the types that `shape` names; one line says which."""
    try:
        shape.model_validate(content)
    except ValidationError as error:
        raise UserError(f"'{path}' is damaged ({problem(error)}){more}") from None


def problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Return one "key: old -> new" per setting that decides results and differs between two manifests.

    Example:
        >>> base = {"format": 1, "kind": "attack", "config": {"seed": 0}, "model": {}, "data": {}}
        >>> differences(base, base | {"config": {"seed": 1}})
        ['seed: 0 -> 1']
    """
    found = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in ("format", "kind") if old.get(key) != new.get(key)]
    for section, prefix in (("config", ""), ("model", "model "), ("data", "data ")):
        before, after = old.get(section) or {}, new.get(section) or {}
        if section == "data":
            before, after = without_contents(before, after), without_contents(after, before)
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                found.append(f"{prefix}{key}: {_short(before.get(key))} -> {_short(after.get(key))}")
    return found


_CONTENTS = ("content", "contents")


def without_contents(data: Mapping[str, Any], other: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what a manifest says of data without the digests of content that `other` lacks: older runs have none.

    Example:
        >>> now = {"fingerprint": "ab", "content": "cd", "val": {"content": "ef"}}
        >>> without_contents(now, {"fingerprint": "ab", "val": {"content": "01"}})
        {'fingerprint': 'ab', 'val': {'content': 'ef'}}
    """
    found = {}
    for key, value in data.items():
        theirs = other.get(key)
        if key in _CONTENTS and theirs is None:
            continue
        inside = theirs if isinstance(theirs, Mapping) else {}
        found[key] = without_contents(value, inside) if isinstance(value, Mapping) else value
    return found


def is_manifest(content: object) -> bool:
    """Whether a parsed JSON file is the manifest of a run and not some other program's.

    Example:
        >>> is_manifest({"format": 1, "kind": "attack", "config": {}}), is_manifest({"name": "an app"})
        (True, False)
    """
    return isinstance(content, dict) and {"format", "kind", "config"} <= content.keys()


def require_same(old: Manifest, new: Manifest, folder: Path, *, finished: Callable[[], bool] = lambda: False) -> None:
    """Refuse to continue a run under other settings, model or data, and name what differs.

    Args:
        finished: whether it would only be read, asked where that matters: what an earlier version began by another
            bound is not gone on with by this one's.
    """
    found = differences(old, new)
    # Earlier versions kept no digests, or fewer: what has none is not compared.
    kept, read = ((manifest.get("named_files") or {}) for manifest in (old, new))
    found += [f"{what}: other content of the same name" for what in kept if kept[what] != read.get(what, kept[what])]
    before, after = ((manifest.get("plan") or {}).get("bound") for manifest in (old, new))
    if before is not None and before != after and not finished():
        found.append(f"bound: {before} -> {after}")
    if not found and old.get("probe") is not None and new.get("probe") is not None:
        from robustvlm.core.probe import change_of  # with numpy

        answers = change_of(old["probe"], new["probe"])
        if answers is not None:
            raise UserError(
                f"the model '{(new.get('model') or {}).get('spec')}' is not the one that the run in '{folder}' was "
                f"made with: {answers}; bring that model back, choose another --name, or start over with --fresh"
            )
    if found:
        raise UserError(
            f"the run in '{folder}' was made with other settings ({'; '.join(found)}): "
            "choose another --name, or start over with --fresh"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Digests of what a finished run has written: its results are those of its manifest, or they are refused

CHECKSUMS = "checksums.json"
CHECKSUMS_FORMAT = 1


@dataclass(frozen=True)
class RunFile:
    """What becomes of a file that runs write: digests are taken of it, and it goes along with a copy of the model."""

    sealed: bool = True
    copied: bool = False


_MODEL, _RESULT, _ASIDE = RunFile(copied=True), RunFile(), RunFile(sealed=False)

FILES: dict[str, RunFile] = {
    "summary.json": _RESULT,
    CHECKSUMS: _ASIDE,
    "model.json": _MODEL,
    "prompts.json": _MODEL,
    "immunity.json": _MODEL,
    "immunity.safetensors": _MODEL,
    "prompts.safetensors": _MODEL,
    "training.json": _RESULT,
    "trees.json": _MODEL,
    "soup.json": _MODEL,
    "results.parquet": _RESULT,
    "certificates.jsonl": _RESULT,
    "captions.parquet": _RESULT,
    "corrupted.parquet": _RESULT,
    "attacked.parquet": _RESULT,
    "report.html": _ASIDE,
    "report.md": _ASIDE,
    "report.tex": _ASIDE,
    TRACKED: _ASIDE,
    "gallery": _RESULT,
    "adversarial": _ASIDE,
    "features": _ASIDE,
    "audit.json": _ASIDE,
    "audit.jsonl": _ASIDE,
    "last.safetensors": RunFile(copied=True, sealed=False),
    "best.safetensors": RunFile(copied=True, sealed=False),
    "weights.safetensors": _MODEL,
    "purifier.safetensors": _MODEL,
    "mapper.safetensors": _MODEL,
    "training": _ASIDE,
    "parts": _MODEL,
    "open_clip_config.json": _MODEL,
    "open_clip_model.safetensors": _MODEL,
    "bpe_merges.txt.gz": _MODEL,
    "tokenizer.json": _MODEL,
    "tokenizer_config.json": _MODEL,
    "special_tokens_map.json": _MODEL,
    "manifest.json": _ASIDE,
}
"""Everything that runs write besides journals and the lock, in the order in which `--fresh` deletes it.

Without summary and journals a run starts over, so that a deletion cut short leaves nothing that could be taken for
results; the manifest, which goes last, marks the folder as ours. No digests are taken of what a run goes on from
(checkpoints and kept features, each bound to the run by itself), of reports, which are made again, of audits, which
come later, and of all adversarial images, where they were asked for: they may be many, and nothing reads them.
"""


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
    files = {path.relative_to(folder).as_posix(): digest_of(path) for path in _final(folder)}
    content = {"format": CHECKSUMS_FORMAT, "run": identity, "files": files}
    write_text(folder / CHECKSUMS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def forget_checksums(folder: Path) -> None:
    """Take back that the results are complete, before they are written anew."""
    (folder / CHECKSUMS).unlink(missing_ok=True)


def sealed(folder: Path, manifest: Manifest) -> bool:
    """Whether the digests are there; always true for runs from before there were any."""
    return run_identity(manifest) is None or (folder / CHECKSUMS).is_file()


def require_unchanged(folder: Path, manifest: Manifest, *, what: str = "") -> None:
    """Refuse results that are not those that the run of this manifest wrote.

    Runs from before there were digests pass: nothing is known of theirs.

    Args:
        what: the command that goes on with the run, for the error.

    Raises:
        UserError: the run has not ended; a file is missing, changed or was not there; or all of it is another run's.
    """
    identity, path = run_identity(manifest), folder / CHECKSUMS
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
        if digest_of(present[name]) != known[name]:
            raise UserError(f"'{name}' in '{folder}' is not what the run wrote: put its own back, or {_again(name)}")


def _again(name: str) -> str:
    if name.startswith("gallery/"):
        return "start over with --fresh"
    return f"delete '{CHECKSUMS}' and give the run's command again, which makes '{name}' anew"


def _final(folder: Path) -> Iterator[Path]:
    """Yield the files that digests are taken of, temporary ones left out."""
    for name in (name for name, made in FILES.items() if made.sealed):
        path = folder / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in inside if file.is_file() and not file.name.startswith("."))


def digest_of(path: Path) -> str:
    """Return a digest of the bytes of a file; UserError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        require_regular(path)
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except (NotRegular, OSError) as error:
        raise UserError(f"cannot read '{path}': {error}") from None
    return digest.hexdigest()
