"""From a spec string to a model: bundled, open_clip, hub, folder, or the user's own."""

import json
import logging
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustvlm.core import files, loading, ranks, registry
from robustvlm.errors import UserError, nearest
from robustvlm.models import checkpoints, custom, saved, transformers_load
from robustvlm.models.clip import TEXT_PARTS, ClipVLM, build_clip, put_tower
from robustvlm.models.mllm import PREFIX as _MLLM
from robustvlm.models.mllm.load import load_mllm
from robustvlm.models.transformers_files import PREFIX as _TRANSFORMERS
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import CONFIG_NAME, SUFFIXES, WEIGHT_NAMES, hub_file, tag_file
from robustvlm.runs.manifest import kind_of_run

_log = logging.getLogger("robustvlm")
_ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"tiny": _ASSETS / "tiny", "tiny-robust": _ASSETS / "tiny-robust"}
ADVERSARIALLY_TRAINED = frozenset({"tiny-robust"})
"""Bundled models that were trained to withstand attacks."""
SPEC_FORMS = (
    ("tiny", "the bundled model (EmojiStyles, 64 px)"),
    ("tiny-robust", "the same, adversarially trained (Linf 2/255)"),
    ("NAME/TAG", "an open_clip model with published weights, as ViT-B-32/laion2b_s34b_b79k"),
    ("NAME/FILE", "an open_clip architecture with a local checkpoint, as ViT-B-32/runs/best.safetensors"),
    ("FILE@BASE", "a vision or text tower alone, in place of that of the model BASE, as fare.pt@ViT-L-14/openai"),
    ("hf-hub:ORG/REPO", "an open_clip repository on the Hugging Face hub"),
    ("transformers:FOLDER_OR_REPO", "a CLIP, SigLIP or image tower of the transformers library (needs [hub])"),
    ("transformers:TOWER@MODEL", "an image tower of it, with the text side of MODEL"),
    (
        "mllm:NAME[#QUESTION]",
        "one that answers in words: mllm:tiny, a folder or hub repository (needs [hub]; docs/mllm.md)",
    ),
    ("FOLDER", f"a model made by this program, or a folder with {CONFIG_NAME} and {WEIGHT_NAMES[0]}"),
    ("timm:NAME", "a classifier of timm, also NAME.TAG, and NAME/FILE for a local checkpoint (see docs/models.md)"),
    ("torchvision:NAME", "the same of torchvision, as torchvision:resnet50.IMAGENET1K_V1"),
    ("MODULE:CALLABLE", "your own encoder (see docs/models.md)"),
)
_HUB = "hf-hub:"
_MAKERS = ("finetune", "soup", "purify", "immunize", "tune-prompts", "build")


@dataclass(frozen=True)
class KnownModel:
    """A model that can be named without owning a file: its spec, and where its weights come from."""

    spec: str
    source: str


def list_models() -> list[KnownModel]:
    """Return every bundled model and every pretrained model that open_clip knows.

    Example:
        >>> list_models()[0]
        KnownModel(spec='tiny', source='bundled')
    """
    import open_clip

    bundled = [KnownModel(name, "bundled") for name in BUNDLED]
    return bundled + [KnownModel(f"{name}/{tag}", "open_clip") for name, tag in open_clip.list_pretrained()]


@torch.inference_mode(False)  # what is made in that mode could never be attacked, even outside of it
def load_model(spec: str, *, device: str | torch.device = "cpu") -> VLM:
    """Return the model that `spec` names (see `SPEC_FORMS`): frozen, in evaluation mode, in float32, on `device`.

    Raises UserError when there is no such model, its weights cannot be had or do not fit, or the device is not there.

    Example:
        >>> vlm = load_model("tiny")
        >>> vlm.encode_text(["a cat", "a dog"]).shape[0]
        2
    """
    place = ranks.resolve_device(device)
    if spec.partition(":")[0] in registry.LIBRARIES and not os.path.exists(spec):
        raise UserError(f"'{spec}' is a classifier: open it with robustvlm.load_model or robustvlm.load_classifier")
    if spec in BUNDLED:
        return _from_folder(BUNDLED[spec], spec).to(place)
    if spec.startswith(_HUB):
        return _from_hub(spec.removeprefix(_HUB), spec).to(place)
    if spec.startswith(_TRANSFORMERS):
        return transformers_load.load_transformers(spec, load_model).to(place)
    if spec.startswith(_MLLM):
        return load_mllm(spec, partial(_bundled, spec)).to(place)
    folder = os.path.expanduser(spec)
    if os.path.isdir(folder):  # unlike Path.is_dir, no error for texts that cannot be a path
        if (Path(folder) / saved.CARD_NAME).is_file() and not (Path(folder) / CONFIG_NAME).is_file():
            raise UserError(f"'{spec}' stands on another model: open it with robustvlm.load_model")
        return _from_folder(Path(folder), spec).to(place)
    if registry.names_a_callable(spec):
        return custom.load_custom(spec, place)
    tower, base = split_base(spec)
    if base is not None:
        return _from_tower(tower, base, spec).to(place)
    rest, part = split_part(folder)
    if part is not None and os.path.isdir(rest):
        return _from_folder(Path(rest), spec, part).to(place)
    return _from_name(spec).to(place)


def _bundled(spec: str, name: object) -> ClipVLM:
    """Return the bundled model that the config of `spec` names: any other name in a file could be one of code."""
    if not isinstance(name, str) or name not in BUNDLED:
        raise UserError(
            f"the config of '{spec}' takes its image tower from {name!r}: expected a bundled model, "
            f"{' or '.join(BUNDLED)}"
        )
    return _from_folder(BUNDLED[name], name)


def split_base(spec: str) -> tuple[str, str | None]:
    """Split FILE@BASE, also NAME/FILE#PART@BASE, into the file and its base; a path with an @ inside stays whole.

    Example:
        >>> split_base("ViT-L-14/fare.pt@ViT-L-14/openai"), split_base("runs@home/x.pt")
        (('ViT-L-14/fare.pt', 'ViT-L-14/openai'), ('runs@home/x.pt', None))
    """
    parts = spec.split("@")
    for count in range(1, len(parts)):
        left = "@".join(parts[:count])
        if Path(left.partition("#")[0]).suffix in SUFFIXES and not os.path.exists(spec):
            return left, "@".join(parts[count:])
    return spec, None


def split_part(path: str) -> tuple[str, str | None]:
    """Split FILE#PART into the path and the place in the file; a path with a # inside stays whole.

    Example:
        >>> split_part("runs/last.pt#model_ema"), split_part("runs/last.pt")
        (('runs/last.pt', 'model_ema'), ('runs/last.pt', None))
    """
    left, mark, part = path.rpartition("#")
    return (left, part) if mark and not os.path.exists(path) else (path, None)


def _from_tower(tower: str, base: str, spec: str) -> ClipVLM:
    file, part = split_part(os.path.expanduser(tower))
    name = ""
    if not os.path.isfile(file):
        import open_clip

        name, rest = _split(tower, open_clip.list_models())
        file, part = split_part(os.path.expanduser(rest))
    vlm = load_model(base)
    if not isinstance(vlm, ClipVLM):
        raise UserError(f"'{spec}': the base of a tower must be an open_clip model, and '{base}' is none")
    if name:
        _require_architecture(name, vlm, spec)
    put_tower(vlm, Path(file), spec=spec, part=part)
    _require_activation(Path(file), vlm)
    return vlm


def _require_architecture(name: str, base: ClipVLM, spec: str) -> None:
    """Refuse a tower that is named by another architecture than its base has, or by another activation."""
    from open_clip import get_model_config

    named, (config, quick) = get_model_config(name) or {}, json.loads(base.architecture)
    if any(named.get(key) != json.loads(json.dumps(config.get(key))) for key in ("embed_dim", "vision_cfg")):
        raise UserError(f"'{spec}': '{base.spec}' is no {name}: name a base of the tower's architecture")
    if named.get("quick_gelu") and not (quick or config.get("quick_gelu")):
        raise UserError(f"'{spec}': {name} uses QuickGELU and '{base.spec}' does not: name the base it was made from")


def _require_activation(file: Path, vlm: ClipVLM) -> None:
    """Refuse a file beside which transformers says that it was trained with another activation."""
    described = file.parent / "config.json"
    content = files.read_object(described) if described.is_file() else {}
    if content.get("model_type") not in ("clip", "clip_vision_model", "clip_text_model"):
        return
    parts = [content[key] for key in ("vision_config", "text_config") if isinstance(content.get(key), dict)] or [
        content
    ]
    config, forced = json.loads(vlm.architecture)
    ours = {"quick_gelu" if forced or config.get("quick_gelu") else "gelu"}
    theirs = {str(part.get("hidden_act", "quick_gelu")) for part in parts}  # transformers' own default
    if theirs != ours:
        raise UserError(
            f"'{described}' says that '{file.name}' was trained with {' and '.join(sorted(theirs))}, and '{vlm.spec}' "
            f"computes {', '.join(ours)}: name the architecture that has it, as ViT-L-14-quickgelu or ViT-L-14"
        )


def _from_folder(folder: Path, spec: str, part: str | None = None) -> ClipVLM:
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(_why_no_model(folder, spec))
    present = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    if not present:
        raise UserError(f"the folder '{spec}' has {CONFIG_NAME} but no weights: put {WEIGHT_NAMES[0]} beside it")
    try:
        return build_clip(f"local-dir:{folder}", present[0], spec=spec, part=part)
    except checkpoints.TowerAlone as alone:
        place = f"{present[0]}#{part}" if part else str(present[0])
        raise checkpoints.TowerAlone(alone.what, alone.tower, spec=place) from None


def _why_no_model(folder: Path, spec: str) -> str:
    wanted = f"{CONFIG_NAME} and {WEIGHT_NAMES[0]}"
    kind = kind_of_run(folder)
    if kind is None:
        return f"the folder '{spec}' holds no model: expected {wanted}"
    if kind in _MAKERS:
        return f"the run '{spec}' of `robustvlm {kind}` has not ended: give its command again to go on"
    return f"'{spec}' is a run of `robustvlm {kind}` and holds no model: pass the model that it was run on"


def _from_hub(repo: str, spec: str) -> ClipVLM:
    advice = "check the network and the name, or pass a local folder with its files"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"a hub model is named hf-hub:ORG/REPO, got '{spec}'")
    config = hub_file(repo, [CONFIG_NAME], advice=advice)
    weights = hub_file(repo, WEIGHT_NAMES, advice=advice)
    content = files.read_object(config, parts=TEXT_PARTS)
    text = (content.get("model_cfg") or {}).get("text_cfg") or {}
    # A tokenizer of transformers is named by the hub config, not stored beside the two files fetched here.
    tokenizer = spec if text.get("hf_tokenizer_name") else None
    merges = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if merges:
        hub_file(repo, [Path(str(merges)).name], advice=advice)
    return build_clip(f"local-dir:{config.parent}", weights, spec=spec, tokenizer_source=tokenizer)


def _from_name(spec: str) -> ClipVLM:
    with loading.quick_imports():
        import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name, rest = _split(spec, open_clip.list_models())
    if not rest:
        example = f"'{name}/{next(iter(_tags(name)), 'FILE')}'"
        raise UserError(f"'{name}' is an architecture: say which weights, as {example}, or give a checkpoint file")
    tag = get_pretrained_cfg(name, rest)
    if tag:
        weights = tag_file(tag, advice=f"check the network, or pass a local file as '{name}/FILE.safetensors'")
        # Which activation the weights were trained with is the tag's to say; open_clip only warns about it.
        return build_clip(name, weights, spec=spec, preprocess=tag, quick_gelu=bool(tag.get("quick_gelu")))
    file, part = split_part(os.path.expanduser(rest))
    path = Path(file)
    if not os.path.exists(path) and path.suffix not in SUFFIXES:
        hint = nearest(rest, _tags(name)) if _tags(name) else "open_clip has no published weights for it"
        raise UserError(f"'{name}' has no weights '{rest}', and there is no such file; {hint}")
    try:
        vlm = build_clip(name, path, spec=spec, preprocess=_shared_preprocess(name), part=part)
    except checkpoints.TowerAlone as alone:
        tags = _tags(name)
        base = f"{name}/{'openai' if 'openai' in tags else tags[0]}" if tags else "BASE"
        raise checkpoints.TowerAlone(alone.what, alone.tower, spec=spec, base=base) from None
    _require_activation(path, vlm)
    if unsure := _unsure(name):
        _log.warning(
            "the file of '%s' does not say how it was trained: %s; a model folder's config says it", spec, unsure
        )
    return vlm


def _split(spec: str, architectures: list[str]) -> tuple[str, str]:
    """Split NAME/WEIGHTS; the name may be written with a slash of its own, as OpenAI's ViT-B/32."""
    parts = spec.split("/")
    for count in range(1, len(parts) + 1):
        name = "-".join(parts[:count])
        if name in architectures:
            return name, "/".join(parts[count:])
    if Path(split_part(spec)[0]).suffix in SUFFIXES:
        raise UserError(f"a checkpoint needs its architecture before it, as 'ViT-B-32/{spec}'")
    if spec.endswith(".py"):
        own = f"{Path(spec).stem}:load"
        raise UserError(f"'{spec}' is a Python file: name what makes the model in it, as '{own}' (docs/models.md)")
    if spec.startswith((".", "/", "~")):
        raise UserError(f"no model folder at '{spec}'")
    hint = nearest(parts[0], [*BUNDLED, *architectures])
    import timm  # which open_clip has loaded by now

    if timm.is_model(parts[0]):
        hint = f"the classifier of timm is 'timm:{spec}'; {hint}"
    raise UserError(f"unknown model '{spec}'; {hint} (`robustvlm models` lists all)")


def _tags(name: str) -> list[str]:
    import open_clip

    return list(open_clip.pretrained.list_pretrained_tags_by_model(name))


def _shared_preprocess(name: str) -> dict[str, Any] | None:
    """Return what all published weights of an architecture agree on, so that a local SigLIP gets SigLIP's mean."""
    found = _published_preprocess(name)
    return found[0] if found and all(other == found[0] for other in found) else None


def _published_preprocess(name: str) -> list[dict[str, Any]]:
    from open_clip.pretrained import get_pretrained_cfg

    keys = ("mean", "std", "interpolation", "resize_mode")
    return [{key: get_pretrained_cfg(name, tag).get(key) for key in keys} for tag in _tags(name)]


def _unsure(name: str) -> str:
    """Say what a checkpoint of an architecture may have been trained with other than it is read with; "" if nothing.

    Example:
        >>> _unsure("ViT-B-16-SigLIP")
        ''
        >>> _unsure("RN50")
        "published weights of this architecture use QuickGELU, and GELU is taken ('RN50-quickgelu' has the other)"
    """
    from open_clip import get_model_config
    from open_clip.pretrained import get_pretrained_cfg

    found, said = _published_preprocess(name), []
    differ = [key for key in (found[0] if found else ()) if any(one[key] != found[0][key] for one in found)]
    if differ:
        said.append(f"differ in {' and '.join(differ)}, and CLIP's own are taken")
    quick = (get_model_config(name) or {}).get("quick_gelu", False)
    if not quick and any(get_pretrained_cfg(name, tag).get("quick_gelu") for tag in _tags(name)):
        said.append(f"use QuickGELU, and GELU is taken ('{name}-quickgelu' has the other)")
    return f"published weights of this architecture {'; some '.join(said)}" if said else ""
