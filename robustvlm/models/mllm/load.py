"""From `mllm:FOLDER_OR_NAME` to a model: read without code, whole, with the prompt it was tuned on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustvlm.core.boundary import same_random_state
from robustvlm.core.files import read_bytes, read_json
from robustvlm.errors import UserError, nearest
from robustvlm.models import transformers_files as files
from robustvlm.models.mllm.checks import require_prompt, try_out
from robustvlm.models.mllm.families import Family, Llava
from robustvlm.models.mllm.known import family_of
from robustvlm.models.mllm.model import PREFIX, QUESTION, MllmVLM
from robustvlm.models.mllm.tongue import Tongue
from robustvlm.models.transformers_load import loading_options, read_image_processor, read_tokenizer, require_whole
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import brief

BUNDLED = {"tiny": Path(__file__).parents[2] / "assets" / "tiny-mllm"}
"""Bundled models by what stands behind the prefix."""
TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "vit", "robustvlm_tiny_tower")
_OWN_TOWER = "robustvlm_tiny_tower"
_POOLED = "@pooled"


def split_question(spec: str) -> tuple[str, str, bool]:
    """Split `mllm:PLACE[@pooled][#QUESTION]` into the place, the question ("": the default) and whether it is pooled.

    Example:
        >>> split_question("mllm:tiny@pooled"), split_question("mllm:tiny#Describe the picture.")
        (('tiny', '', True), ('tiny', 'Describe the picture.', False))
    """
    place, question = spec.removeprefix(PREFIX), ""
    if not os.path.isdir(os.path.expanduser(place)):
        place, mark, question = place.partition("#")
        if mark and not question.strip():
            raise UserError(f"'{spec}' asks nothing: write {PREFIX}NAME#QUESTION, or leave out the #")
    pooled = place.endswith(_POOLED)
    return place.removesuffix(_POOLED), question.strip(), pooled


def load_mllm(spec: str, load_base: Callable[[str], VLM]) -> MllmVLM:
    """Return the model of `mllm:PLACE[@pooled][#QUESTION]`: a bundled name, a folder, or a repository on the hub.

    Args:
        load_base: loads the bundled model whose image tower a bundled one has.

    Raises:
        UserError: no such model, one of another family, or one that is not whole.
    """
    place, question, pooled = split_question(spec)
    own = PREFIX + place
    module = files.library()
    if place not in BUNDLED and "/" not in place and not os.path.isdir(os.path.expanduser(place)):
        raise UserError(
            f"no folder at '{place}', and no bundled {PREFIX} model of that name: {nearest(place, BUNDLED)}"
        )
    folder = BUNDLED[place] if place in BUNDLED else files.model_folder(place, PREFIX)
    config = files.read_config(folder, own)
    family = _require_family(config, own)
    model = _load_weights(module, folder, config, family, own, load_base)
    how = family.preprocessing(read_image_processor(module, folder, own, family.settings), own)
    tongue = _tongue(module, folder, config, family, own)
    vlm = MllmVLM(
        model,
        how,
        tongue,
        folder,
        spec=spec,
        config=files.config_text(config),
        family=family,
        question=question or QUESTION,
        pooled=pooled,
    )
    try_out(vlm, own)
    if type(family) is not Llava:
        require_prompt(module, folder, vlm, own)
    return vlm


def _require_family(config: Mapping[str, Any], spec: str) -> Family:
    family, tower = family_of(config, spec), (config.get("vision_config") or {}).get("model_type")
    if isinstance(family, Llava) and tower not in TOWERS:
        raise UserError(f"the image tower of '{spec}' is of type '{tower}': known are {', '.join(TOWERS[:-1])}")
    return family


def _load_weights(
    module: Any, folder: Path, config: Mapping[str, Any], family: Family, spec: str, load_base: Callable[[str], VLM]
) -> Any:
    name = family.model
    bundled = config["vision_config"]["model_type"] == _OWN_TOWER
    if bundled:
        from robustvlm.models.mllm.tower import register

        register()
    try:
        with files.quiet(), same_random_state():
            kind = getattr(module, name, None)
            if kind is None:
                raise UserError(f"'{spec}' needs {name}, which transformers {module.__version__} lacks: update it")
            options = loading_options(config["model_type"])
            model, found = kind.from_pretrained(str(folder), attn_implementation="sdpa", **options)
    except UserError:
        raise
    except Exception as error:  # a wrong config or checkpoint fails in any way inside transformers
        raise UserError(f"'{spec}' cannot be loaded as {name}: {brief(error)}") from error
    if bundled:
        base: Any = load_base(str(config["vision_config"].get("base", "tiny")))
        model.model.vision_tower.visual.load_state_dict(base.model.visual.state_dict())
    require_whole(model, found, spec, name, made=lambda key: bundled and ".visual." in key)
    # A checkpoint's own may sample, or punish repetition: what is judged here is the greedy answer.
    told = model.generation_config
    model.generation_config = module.GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=told.eos_token_id, pad_token_id=told.pad_token_id or 0
    )
    return model


def _tongue(module: Any, folder: Path, config: Mapping[str, Any], family: Family, spec: str) -> Tongue:
    tokenizer = read_tokenizer(module, folder, spec)
    image = config.get("image_token_index", config.get("image_token_id"))
    if image is None:
        raise UserError(f"the config of '{spec}' names no image token: expected image_token_index")
    name = tokenizer.convert_ids_to_tokens(int(image))
    ends = _ends(folder, config, tokenizer)
    if name is None or not ends:
        raise UserError(f"the tokenizer of '{spec}' lacks the token {image} of the image, or one that ends an answer")
    if template := _template(folder):
        tokenizer.chat_template = template

    def chat(question: str) -> str:
        if not family.chats:
            return f"{name}{question}"
        if not tokenizer.chat_template:
            if not family.plain:
                raise UserError(f"'{spec}' has no chat template, so that no question can be put to it")
            return family.plain.replace("<image>", str(name)).replace("{question}", question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        try:
            return str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # templates fail in any way
            raise UserError(f"the chat template of '{spec}' fails on a question: {brief(error)}") from error

    def write(question: str) -> str:
        return family.write(tokenizer, str(name), chat(question))

    digest = hashlib.blake2b(f"{files.tokenizer_digest(folder)} {ends} {image}".encode(), digest_size=16).hexdigest()
    return Tongue(tokenizer, chat, write, int(image), ends, digest)


def _ends(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    told = read_json(path).get("eos_token_id") if path.is_file() else None
    found = told if told is not None else tokenizer.eos_token_id
    if found is None:
        found = (config.get("text_config") or {}).get("eos_token_id")
    several = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(int(token) for token in several)


def _template(folder: Path) -> str | None:
    """Return the chat template that stands beside a model, where its tokenizer's own settings do not hold one."""
    plain, old = (folder / name for name in files.CHAT_FILES)
    if plain.is_file():
        return read_bytes(plain, most=2**20).decode()
    if old.is_file():
        return str(json.loads(read_bytes(old, most=2**20)).get("chat_template") or "") or None
    return None
