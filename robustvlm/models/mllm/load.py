"""From `mllm:FOLDER_OR_NAME` to a model: of a known type, read without code, whole, with the prompt it was tuned on."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from robustvlm.core.boundary import same_random_state
from robustvlm.core.files import read_bytes, read_object
from robustvlm.core.framing import trial_pixels
from robustvlm.errors import UserError, nearest
from robustvlm.models import transformers_files as files
from robustvlm.models.mllm.families import Family, Gemma3, InternVL, Llava, PaliGemma, VipLlava
from robustvlm.models.mllm.model import PREFIX, QUESTION, MllmVLM
from robustvlm.models.mllm.qwen import Qwen2VL, Qwen25VL
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


def load_mllm(spec: str, load_base: Callable[[object], VLM]) -> MllmVLM:
    """Return the model of `mllm:PLACE[@pooled][#QUESTION]`: a bundled name, a folder, or a repository on the hub.

    Args:
        load_base: loads the bundled model whose image tower a bundled one has, by the name in its config, and no other.

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
    tongue = replace(tongue, ends=_said(tongue.ends, model, own))
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
    try:
        family, tower = family_of(config, spec), (config.get("vision_config") or {}).get("model_type")
    except (TypeError, ValueError) as error:  # a text where a number belongs
        raise UserError(f"the config of '{spec}' has a value of another form ({brief(error)})") from None
    if isinstance(family, Llava) and tower not in TOWERS:
        raise UserError(f"the image tower of '{spec}' is of type '{tower}': known are {', '.join(TOWERS[:-1])}")
    return family


def _load_weights(
    module: Any, folder: Path, config: Mapping[str, Any], family: Family, spec: str, load_base: Callable[[object], VLM]
) -> Any:
    name = family.model
    bundled = (config.get("vision_config") or {}).get("model_type") == _OWN_TOWER
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
        base: Any = load_base(config["vision_config"].get("base", "tiny"))
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
    told = read_object(path).get("eos_token_id") if path.is_file() else None
    found = told if told is not None else tokenizer.eos_token_id
    if found is None:
        found = (config.get("text_config") or {}).get("eos_token_id")
    several = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in several):
        raise UserError(f"'{folder}' ends an answer at {several}: expected the numbers of tokens as eos_token_id")
    return tuple(several)


def _said(ends: tuple[int, ...], model: Any, spec: str) -> tuple[int, ...]:
    """Return the end tokens that the model can say; those beyond its vocabulary end nothing."""
    head = model.get_output_embeddings()
    found = tuple(end for end in ends if head is None or 0 <= end < head.weight.shape[0])
    if not found:
        raise UserError(f"'{spec}' can say none of the tokens that end an answer: {', '.join(map(str, ends))}")
    return found


def _template(folder: Path) -> str | None:
    """Return the chat template that stands beside a model, where its tokenizer's own settings do not hold one."""
    plain, old = (folder / name for name in files.CHAT_FILES)
    if plain.is_file():
        return read_bytes(plain, most=2**20).decode()
    if old.is_file():
        return str(read_object(old, most=2**20).get("chat_template") or "") or None
    return None


# Which types of multimodal models are known, and why others are not

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "vipllava": VipLlava,
    "internvl": InternVL,
    "gemma3": Gemma3,
    "paligemma": PaliGemma,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
}
"""By `model_type`."""

ELSEWHERE = {
    "llava_next": "cuts images into tiles and a smaller copy",
    "llava_onevision": "cuts images into tiles and a smaller copy",
    "qwen3_vl": "feeds several layers of the language model from the image tower",
    "idefics3": "enlarges images before it reduces them",
    "smolvlm": "enlarges images before it reduces them",
    "blip-2": "reads an image through queries",
    "instructblip": "reads an image through queries",
    "mllama": "lets the language model look at the image in layers of its own",
}
"""Types that are not of this form, and in what."""


def family_of(config: Mapping[str, Any], spec: str) -> Family:
    """Return the family of a model by its config.

    Raises:
        UserError: one of another form; it says in what.
    """
    kind = str(config["model_type"])
    if kind in FAMILIES:
        return FAMILIES[kind].of(config)
    why = f", which {ELSEWHERE[kind]}" if kind in ELSEWHERE else ""
    close = "" if why else f" ({nearest(kind, FAMILIES)})"
    raise UserError(
        f"'{spec}' is a model of type '{kind}'{why}: mllm: takes {', '.join(FAMILIES)}{close}; write another as an "
        "encoder or classifier of your own, module:callable (docs/models.md)"
    )


# What a model has to show when it is opened: the library's own tokens and logits, and that it looks

_SAME = 1e-3
"""Two ways through one model may differ by so much of the largest logit."""


def require_prompt(module: Any, folder: Path, vlm: MllmVLM, spec: str) -> None:
    """Refuse a model whose own processor makes other tokens of a question and an image than are read here."""
    family, tongue = vlm.family, vlm.tongue
    pixels = trial_pixels(1, vlm.image_size)
    picture = Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
    asked = tongue.chat(vlm.question)
    # As its `apply_chat_template` does: no second beginning.
    begun = {"add_special_tokens": False} if family.chats and tongue.begun(asked) else {}
    try:
        with files.quiet():
            processor = module.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
            told = processor(text=[asked], images=[picture], return_tensors="pt", **family.settings, **begun)
    except Exception as error:  # a processor with wrong settings fails in any way
        raise UserError(f"the processor of '{spec}' fails on a question and an image: {brief(error)}") from error
    theirs = told["input_ids"][0].tolist()
    with torch.no_grad():
        places = vlm.family.project(vlm.model.model, vlm.tokens(pixels)).shape[1]
    ours = [*vlm.prompt.before, *[tongue.image] * places, *vlm.prompt.after]
    if ours != theirs:
        raise UserError(
            f"the processor of '{spec}' makes {len(theirs)} tokens of a question and an image, and not the {len(ours)} "
            f"that are read here ({theirs.count(tongue.image)} and {places} of the image): use another model"
        )


@torch.no_grad()
def try_out(vlm: MllmVLM, spec: str) -> None:
    """Refuse a model that gives tokens or logits that are not finite, or that answers without looking at the image."""
    pixels = trial_pixels(2, vlm.image_size)
    try:
        tokens = vlm.tokens(pixels)
        logits = vlm.next_logits(tokens, torch.zeros(2, 1, dtype=torch.long))
        if not tokens.isfinite().all() or not logits.isfinite().all():
            raise UserError(f"'{spec}' gives tokens or logits that are not finite")
        _require_same(vlm, pixels[:1], logits[0, 0], spec)
    except UserError:
        raise
    except Exception as error:  # of versions of the library with a defect, or of a config that misleads
        raise UserError(
            f"'{spec}' fails under transformers {files.library().__version__}: {brief(error)}; try its newest"
        ) from error
    if torch.equal(logits[0], logits[1]):
        raise UserError(f"'{spec}' says the same of two different images to the last bit: it does not look at them")


@torch.no_grad()
def _require_same(vlm: MllmVLM, pixels: torch.Tensor, found: torch.Tensor, spec: str) -> None:
    """Refuse a model whose own forward gives other logits than the way through its parts `found` [V]."""
    before, after = (torch.tensor([part], dtype=torch.long) for part in (vlm.prompt.before, vlm.prompt.after))
    places = vlm.family.project(vlm.model.model, vlm.tokens(pixels)).shape[1]
    ids = torch.cat([before, torch.full((1, places), vlm.tongue.image), after], dim=1)
    theirs = vlm.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **vlm.family.inputs((pixels - vlm.mean) / vlm.std, before.shape[1], places, after.shape[1]),
    ).logits[0, -1]
    off = float((theirs - found).abs().max() / theirs.abs().max().clamp_min(1))
    if not off <= _SAME:
        raise UserError(
            f"'{spec}' gives other logits under transformers {files.library().__version__} than through its parts "
            f"(by {off:.1g} of the largest): try the newest"
        )
