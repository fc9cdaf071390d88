"""Splits and overlaps: training and test images must not become one number."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustvlm.data.source import DataSource, select
from robustvlm.data.specs import Spec, parse_spec
from robustvlm.errors import UserError
from robustvlm.text import without_secrets

# Splits in one place, and what is no data at all: training and test images must not become one number

_KINDS = {
    "train": "train", "training": "train", "trainset": "train",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "dev": "val",
    "test": "test", "testing": "test", "testset": "test",
}  # fmt: skip

_JUNK = frozenset(
    {
        "__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
        "system volume information", "thumbs.db", "desktop.ini", "icon\r",
    }
)  # fmt: skip

_MOST_SHOWN = 8


def is_junk(name: str) -> bool:
    """Whether a file or folder is what systems and tools leave behind, never data: hidden ones are, too.

    Example:
        >>> is_junk("__MACOSX"), is_junk(".ipynb_checkpoints"), is_junk("cat")
        (True, True, False)
    """
    return name.startswith(".") or name.casefold() in _JUNK


def split_kind(name: str) -> str | None:
    """Return which split a name stands for on its own: `train`, `val` or `test`, or None.

    Example:
        >>> split_kind("Validation"), split_kind("test"), split_kind("test tube")
        ('val', 'test', None)
    """
    return _KINDS.get(name.casefold())


def split_in(name: str) -> str | None:
    """Return which split a longer name tells of, as `seg_train`, `test2017` or `train-00000-of-00002`, or None.

    Example:
        >>> split_in("seg_train"), split_in("test2017"), split_in("contest")
        ('train', 'test', None)
    """
    kinds = {_KINDS[word] for word in re.findall(r"[a-z]+", name.casefold()) if word in _KINDS}
    return kinds.pop() if len(kinds) == 1 else None


def chosen_split(root: Path, split: str | None) -> tuple[Path, str | None]:
    """Return the folder of a split below `root`, or `root` itself where none is asked for and there is only one.

    The second value is the split's folder within each class folder, where the classes come first (`cat/test`).

    Raises:
        UserError: several splits in one place and none chosen, or no such split.
    """
    folders = _folders(root)
    if split is None:
        found = _splits(folders)
        if len(found) > 1:
            first = next((name for kind, name in found if kind == "test"), found[-1][1])
            shown = ", ".join(f"'{name}'" for _, name in found)
            raise UserError(
                f"the subfolders {shown} of {root} are splits, not classes: choose one with ?split={first}, "
                f"or pass {root / first}"
            )
        return root, None
    here = _named(folders, split)
    if here is not None:
        return here, None
    within = {below.name for folder in folders if (below := _named(_folders(folder), split)) is not None}
    if len(within) == 1:
        return root, within.pop()
    shown = ", ".join(f"'{name}'" for _, name in _splits(folders)) or "none"
    raise UserError(f"{root} has no split '{split}': its splits are {shown}")


def _splits(folders: list[Path]) -> list[tuple[str, str]]:
    """Return kind and name of the folders that are splits.

    Names of several words ("test tube") need folders inside and no files, or others that are the same but for the word
    of the split ("train2017", "val2017").
    """
    alike = Counter(rest for rest, _ in {(_rest_of(folder.name), split_in(folder.name)) for folder in folders})
    found = []
    for folder in folders:
        kind = split_kind(folder.name)
        if kind is None and (kind := split_in(folder.name)) is not None:
            kind = kind if alike[_rest_of(folder.name)] > 1 or _holds_folders_only(folder) else None
        if kind is not None:
            found.append((kind, folder.name))
    return found if len({kind for kind, _ in found}) > 1 else []


def _named(folders: Iterable[Path], split: str) -> Path | None:
    """Return the folder of a split: of that name, else the one that stands for the same split."""
    folders = list(folders)
    exact = [folder for folder in folders if folder.name == split]
    alike = [folder for folder in folders if (kind := split_kind(split)) and split_kind(folder.name) == kind]
    longer = [folder for folder in folders if (kind := split_kind(split)) and split_in(folder.name) == kind]
    return next((found[0] for found in (exact, alike, longer) if len(found) == 1), None)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not is_junk(path.name))
    except OSError:
        return []


def _rest_of(name: str) -> str | None:
    """Return a longer name without the word that tells its split; None where it tells none."""
    if split_in(name) is None:
        return None
    return re.sub(r"[a-z]+", lambda word: "*" if word.group() in _KINDS else word.group(), name.casefold())


def _holds_folders_only(folder: Path) -> bool:
    entries = [path for path in folder.iterdir() if not is_junk(path.name)]
    return bool(entries) and all(path.is_dir() for path in entries)


def one_split(files: Iterable[Path], split: str | None, where: object) -> list[Path]:
    """Return the files of one split, told by their names (`test-00000-of-00001`), or all where no split is told.

    Raises:
        UserError: files of several splits and none chosen, or none of the one that is.
    """
    of: dict[str | None, list[Path]] = {}
    for file in files:
        of.setdefault(split_in(file.name), []).append(file)
    if split is not None:
        wanted = split_kind(split) or split
        begins = re.compile(re.escape(split) + r"(?![A-Za-z])")
        found = of.get(wanted) or [file for group in of.values() for file in group if begins.match(file.name)]
        if not found:
            raise UserError(f"{where} has no file of the split '{split}': {said_of(Counter(map(str, of)))}")
        return found
    told = [kind for kind in of if kind is not None]
    if len(of) > 1 and told:
        kinds = ", ".join(f"{kind or 'unnamed'} ({len(group)} files)" for kind, group in of.items())
        first = "test" if "test" in told else told[-1]
        raise UserError(f"{where} holds several splits, {kinds}: choose one with ?split={first}, or pass its files")
    return [file for group in of.values() for file in group]


def said_of(aside: Mapping[str, int]) -> str:
    """Return what was left aside, the most first.

    Example:
        >>> said_of(Counter({".txt": 3, "__MACOSX": 1}))
        "3 x '.txt', '__MACOSX'"
    """
    order = sorted(aside.items(), key=lambda item: (-item[1], item[0]))
    said = [f"'{name}'" if count == 1 else f"{count:,} x '{name}'" for name, count in order[:_MOST_SHOWN]]
    return ", ".join(said) + (f" and {len(order) - _MOST_SHOWN} kinds more" if len(order) > _MOST_SHOWN else "")


# Images that teach and images that judge must be others: what is known of that before any of them is looked at


_ABOUT = {
    "imagefolder": frozenset({"empty", "links"}),
    "parquet": frozenset({"label", "captions", "subgroup"}),
    "hf": frozenset({"label", "captions", "subgroup"}),
    "wds": frozenset({"label", "captions"}),
    "torchvision": frozenset({"download"}),
}
"""Options that say what is known of images, or how they are come by, and choose none: ids mean what they did."""


def same_place(first: str, second: str) -> bool:
    """Whether equal ids mean equal images: ids of files are relative to their folder, those of emoji stand alone.

    Example:
        >>> same_place("emoji?split=train", "emoji?copies=1"), same_place("imagefolder:a/", "imagefolder:b/../a")
        (True, True)
        >>> same_place("imagefolder:a", "imagefolder:b"), same_place("parquet:a", "parquet:a?subgroup=style")
        (False, True)
    """
    one, other = parse_spec(first), parse_spec(second)
    if one.kind != other.kind:
        return False
    return one.kind == "emoji" or (_resolved(one.rest), _choosing(one)) == (_resolved(other.rest), _choosing(other))


def group_of(spec: str) -> Callable[[str], str]:
    """Return what `DataSource.group` tells of an id, without opening the data; of a source of one's own it is the id.

    Example:
        >>> group_of("emoji?split=test")("emoji/noto/1f600/3"), group_of("imagefolder:photos")("cat/3.png")
        ('emoji/noto/1f600', 'cat/3.png')
    """
    if spec.partition("?")[0] != "emoji":
        return str
    from robustvlm.data.emoji import drawing_of

    return drawing_of


def group_of_run(manifest: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what tells, by the ids of a run's images, which are copies of one thing: rows do not store it."""
    return group_of(str((manifest.get("data") or {}).get("spec") or ""))


def same_images(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether equal ids mean equal images in two runs, by what their manifests say of their data.

    That is so of data with one fingerprint. Classes and what else is read of images, as captions, are part of it: where
    the two differ in these it says nothing, and the place decides, or the digest of the content.

    Example:
        >>> photos = {"spec": "imagefolder:photos", "fingerprint": "ab", "class_names": ["cat", "dog"]}
        >>> same_images(photos, photos | {"spec": "imagefolder:copy"})
        True
        >>> same_images(photos, photos | {"fingerprint": "cd"})
        False
        >>> same_images(photos, photos | {"fingerprint": "cd", "class_names": ["dog", "cat"]})
        True
    """
    contents = [str(data["content"]) for data in (first, second) if data.get("content") is not None]
    if len(set(contents)) > 1:
        return False
    specs = [str(data.get("spec") or "") for data in (first, second)]
    alike = first.get("fingerprint") is not None and first.get("fingerprint") == second.get("fingerprint")
    try:
        one, other = map(parse_spec, specs)
        there = same_place(*specs)
    except UserError:  # written by hand, or by a version with other kinds of data
        return alike
    if _apart(one, other, told=len(contents) == 2):
        return False
    if alike or (one.kind == other.kind == "emoji"):
        return True
    counts = {data["images"] for data in (first, second) if data.get("images") is not None}
    renamed = first.get("class_names") != second.get("class_names")
    # Under labels of another column nothing is compared, and that has to be said.
    same_labels = one.kind == other.kind and one.options.get("label") == other.options.get("label")
    explained = same_labels and (renamed or _about(one) != _about(other))
    return explained and len(counts) < 2 and (there or len(contents) == 2)


def same_data(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets, as manifests describe them, hold the same names, sizes and labels, changed in place or not.

    Of shards on the net only names are known: those at another address are other data, where addresses are told.

    Example:
        >>> one = {"spec": "wds:https://one/{0..9}.tar", "fingerprint": "ab", "content": "11"}
        >>> same_data(one, one | {"content": "22"}), same_data(one, one | {"content": None})
        (False, True)
        >>> photos = {"spec": "imagefolder:photos", "fingerprint": "ab", "content": "11"}
        >>> same_data(photos, photos | {"content": "22"})
        True
    """
    if first.get("fingerprint") is None or first.get("fingerprint") != second.get("fingerprint"):
        return False
    contents = {str(data["content"]) for data in (first, second) if data.get("content") is not None}
    return len(contents) < 2 or not any(on_the_net(str(data.get("spec") or "")) for data in (first, second))


def _about(spec: Spec) -> dict[str, str]:
    return {name: value for name, value in spec.options.items() if name in _ABOUT.get(spec.kind, ())}


def _choosing(spec: Spec) -> dict[str, str]:
    return {name: value for name, value in spec.options.items() if name not in _ABOUT.get(spec.kind, ())}


def _apart(one: Spec, other: Spec, *, told: bool) -> bool:
    """Whether specs name other images where fingerprints cannot show it; `told`: digests of contents agree.

    Fingerprints of shards know nothing of which member is read, of those on the net of the address neither; those of
    streams of the hub nothing of version and part. Digests of shards are of all members.
    """
    if one.kind != other.kind:
        return False
    names = ("image",) if one.kind == "wds" else ("config", "revision") if one.kind == "hf" and not told else ()
    places = {without_secrets(spec.rest) for spec in (one, other)}
    moved = not told and len(places) > 1 and (on_the_net(one.text) or on_the_net(other.text))
    return moved or any(one.options.get(name) != other.options.get(name) for name in names)


def on_the_net(spec: str) -> bool:
    """Whether a data spec names shards on the net, of which nothing is known but their addresses.

    Example:
        >>> on_the_net("wds:https://one/{0..9}.tar"), on_the_net("wds:shards")
        (True, False)
    """
    return spec.startswith("wds:") and any(scheme in spec.lower() for scheme in ("http://", "https://"))


def in_both(first: str, ids: Iterable[str], second: str, other_ids: Iterable[str]) -> list[str]:
    """Return the ids of images of two data specs that are one image, sorted; none where that cannot be told by ids."""
    return sorted(set(ids) & set(other_ids)) if same_place(first, second) else []


def seen_images(judged: DataSource, ids: Iterable[str], taught: DataSource, other_ids: Iterable[str]) -> list[str]:
    """Return the ids of judged images that are among those that teach, or of one group with such an image, sorted.

    Example:
        >>> from robustvlm.data import open_data
        >>> one, other = open_data("emoji?copies=1"), open_data("emoji?copies=2")
        >>> seen_images(one, one.ids()[:1], other, other.ids()[-len(one.ids()):]) == one.ids()[:1]
        True
    """
    known = list(ids)
    groups = in_both(judged.spec, map(judged.group, known), taught.spec, map(taught.group, other_ids))
    shared = frozenset(groups)
    return sorted(name for name in known if judged.group(name) in shared)


def require_unseen(
    judged: DataSource,
    taught: DataSource,
    *,
    option: str,
    limits: tuple[int | None, int | None] = (None, None),
    advice: str = "pass other images",
) -> None:
    """Refuse images to judge by that are among those that teach, or copies of them, as far as ids and contents tell.

    Args:
        option: that named the judging images; limits: how many of each are used, judging images first.
        advice: what to do instead.

    Raises:
        UserError: the two are the same data, or some ids are in both.
    """
    if same_data(*(_described(source) for source in (judged, taught))):
        raise UserError(f"{option} names the training data, '{taught.spec}': {advice}")
    both: list[str] = []
    found = [(source.ids(), limit) for source, limit in zip((judged, taught), limits, strict=True)]
    chosen = [select(ids, limit) if limit is not None else ids for ids, limit in found if ids is not None]
    if len(chosen) == 2:
        both = seen_images(judged, chosen[0], taught, chosen[1])
    if both:
        copied = "" if set(both) <= set(chosen[1]) else ", or are copies of images that are"
        raise UserError(
            f"{len(both)} images of {option} '{judged.spec}' are also trained on{copied} "
            f"(the first, '{both[0]}'): {advice}"
        )


def _described(source: DataSource) -> dict[str, Any]:
    told = source.content() if on_the_net(source.spec) else None  # else it is not asked for, and reads images
    return {"spec": source.spec, "fingerprint": source.fingerprint(), "content": told}


def require_unseen_validation(
    val: DataSource | None, taught: DataSource, *, val_limit: int | None, limit: int | None
) -> None:
    """Refuse `--val` images of a training that are among those that it is taught with; see `require_unseen`."""
    if val is not None:
        advice = "leave --val out, and a part of them is held out"
        require_unseen(val, taught, option="--val", limits=(val_limit, limit), advice=advice)


def _resolved(rest: str) -> str:
    """Return a path in one spelling, links followed; whatever is no path stays as it is in effect."""
    return os.path.realpath(os.path.expanduser(rest)) if rest else rest


# Images scored at a time: enough to fill the processor, and little memory.
_ROWS = 1024


def copies(features: Tensor, others: Tensor) -> int:
    """Return how many of the features [N, D] are among the others [M, D], to three decimals.

    Example:
        >>> copies(torch.eye(2), torch.eye(2)[1:])
        1
    """
    there = {row.tobytes() for row in _coarse(others)}
    return sum(row.tobytes() in there for row in _coarse(features))


def _coarse(features: Tensor) -> npt.NDArray[np.int16]:
    return (1000 * features).round().to(torch.int16).numpy()
