"""Tiny folders of multimodal models of other families than LLaVA: random weights, tokenizers made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from tests.models.transformers_folders import LLAVA_WORDS, SIDE, VISION, clip_processor, square_processor

_TEXT = {
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_CHAT = (
    "{% for m in messages %}<s>{% for p in m['content'] %}{% if p['type'] == 'image' %}MARK "
    "{% else %}USER {{ p['text'] }} ASSISTANT{% endif %}{% endfor %}{% endfor %}"
)


def words(folder: Path, *, names: dict[str, str], mark: str | None) -> dict[str, int]:
    """Write a tokenizer of whole words that begins every text with <s>.

    Args:
        names: of special tokens besides, by the attribute under which a processor looks for them.
        mark: of an image in the chat template; None for no template.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    specials = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT", *names.values()]
    specials = list(dict.fromkeys(specials))
    vocab = {word: number for number, word in enumerate([*specials, ":", "?", ".", *LLAVA_WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(specials)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    made.save_pretrained(str(folder))
    if mark is not None:
        (folder / "chat_template.jinja").write_text(_CHAT.replace("MARK", mark))
    return {"vocab_size": len(vocab), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _processor(folder: Path, kind: str, **settings: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind, **settings}))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": kind}))


def vipllava(folder: Path, **over: Any) -> Any:
    tokens = words(folder, names={}, mark="<image>")
    clip_processor(folder)
    _processor(folder, "LlavaProcessor", patch_size=8, vision_feature_select_strategy="default",
               num_additional_image_tokens=1)  # fmt: skip
    told = {
        "vision_config": transformers.CLIPVisionConfig(**VISION),
        "text_config": transformers.LlamaConfig(**_TEXT, **tokens),
        "image_token_index": 3,
        "vision_feature_layer": [-1, -2],
        "image_seq_length": 4,
    }
    return transformers.VipLlavaForConditionalGeneration(transformers.VipLlavaConfig(**told | over))


def internvl(folder: Path, **over: Any) -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    tokens = words(folder, names=names, mark="<image>")
    square_processor(folder, "GotOcr2ImageProcessor", resample=3)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_to_patches": True}))
    _processor(folder, "InternVLProcessor", image_seq_length=1)
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}
    told = {
        "vision_config": transformers.InternVLVisionConfig(**vision),
        "text_config": transformers.Qwen2Config(**_TEXT, **tokens),
        "image_token_id": 3,
        "image_seq_length": 1,
        "downsample_ratio": 0.5,
    }
    return transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(**told | over))


def gemma3(folder: Path, *, window: int = 64, **over: Any) -> Any:
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokens = words(folder, names=names, mark="<boi>")
    square_processor(folder, "Gemma3ImageProcessor")
    _processor(folder, "Gemma3Processor", image_seq_length=4)
    text = transformers.Gemma3TextConfig(
        **_TEXT, head_dim=10, sliding_window=window, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=10, **tokens,
    )  # fmt: skip
    told = {
        "vision_config": transformers.SiglipVisionConfig(**VISION | {"patch_size": 4}),
        "text_config": text,
        "mm_tokens_per_image": 4,
        "image_token_index": 3,
        "boi_token_index": 7,
        "eoi_token_index": 8,
    }
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**told | over))


def paligemma(folder: Path, **over: Any) -> Any:
    tokens = words(folder, names={"image_token": "<image>"}, mark=None)
    square_processor(folder, "SiglipImageProcessor", resample=3)
    _processor(folder, "PaliGemmaProcessor")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_seq_length": 4}))
    told = {
        "vision_config": transformers.SiglipVisionConfig(**VISION),
        "text_config": transformers.GemmaConfig(**_TEXT, head_dim=10, **tokens),
        "image_token_index": 3,
        "projection_dim": 20,
    }
    return transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**told | over))


def _qwen(folder: Path) -> dict[str, Any]:
    names = {"image_token": "<image>", "video_token": "<video>"}
    tokens = words(folder, names=names, mark="<s> <image> <s>")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        kind = "image_processor_type" if name[0] == "p" else "video_processor_type"
        settings = {kind: "Qwen2VLImageProcessor" if name[0] == "p" else "Qwen2VLVideoProcessor"}
        settings |= {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": SIDE**2 + 20}}
        (folder / name).write_text(json.dumps(settings))
    text = {**_TEXT, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 2]}}
    return {"text_config": text | tokens, "image_token_id": 3, "video_token_id": 7, "vision_start_token_id": 1}


def qwen2_vl(folder: Path, **over: Any) -> Any:
    told = _qwen(folder)
    _processor(folder, "Qwen2VLProcessor")
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 20, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(**told | {"vision_config": vision} | over)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(folder: Path, **over: Any) -> Any:
    told = _qwen(folder)
    _processor(folder, "Qwen2_5_VLProcessor")
    vision = {"depth": 3, "hidden_size": 24, "out_hidden_size": 20, "num_heads": 2, "intermediate_size": 32,
              "patch_size": 4, "window_size": 8, "fullatt_block_indexes": [1]}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(**told | {"vision_config": vision} | over)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


OTHERS: dict[str, Callable[..., Any]] = {
    "vipllava": vipllava,
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
}
