"""Tiny folders of transformers models: random weights, tokenizers made on the spot, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SIDE = 16
PATCH = 8
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
WORDS = ("a", "photo", "of", "the", "cat", "dog", "two", "dogs", "red", "bike", "and", "an", "apple", "train", "border")


def lively(model: Any, seed: int = 0) -> Any:
    """Give a model weights that are large enough for two inputs to have features far apart."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim >= 2:
                value.normal_(std=0.25)
            elif name.endswith("bias"):
                value.normal_(std=0.1)
        for name, value in (("logit_scale", 2.0), ("logit_bias", -3.5)):
            if hasattr(model, name):
                getattr(model, name).fill_(value)
    return model.eval()


# Tokenizers


def clip_tokenizer(folder: Path) -> dict[str, int]:
    """Write CLIP's kind of byte-pair tokenizer: vocabulary and merges; the end of text is the highest id."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    kind = transformers.CLIPTokenizerFast if hasattr(transformers, "CLIPTokenizerFast") else transformers.CLIPTokenizer
    made = kind.from_pretrained(str(folder), model_max_length=16)
    made.save_pretrained(str(folder))
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    return {"vocab_size": len(vocab), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def unigram(folder: Path, specials: tuple[str, ...], template: str, *, room: int, pad: str, end: str) -> dict[str, int]:
    """Write a Unigram tokenizer of the SentencePiece kind as tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [*WORDS, *(word.upper() for word in WORDS), *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=list(specials), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([" ".join(texts)] * 20, trainer)
    numbered = [(token, made.token_to_id(token)) for token in specials]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbered)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=room,
        pad_token=pad,
        eos_token=end,
        unk_token="<unk>",
        padding_side="right",
    )
    fast.save_pretrained(str(folder))
    return {
        "vocab_size": len(fast),
        "pad_token_id": fast.pad_token_id,
        "eos_token_id": fast.eos_token_id,
        "bos_token_id": 0,
    }


def roberta_tokenizer(folder: Path, room: int) -> dict[str, int]:
    """Write a tokenizer with XLM-R's special tokens in XLM-R's places."""
    return unigram(folder, ("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>", room=room, pad="<pad>", end="</s>")


def siglip_tokenizer(folder: Path, room: int = 12) -> dict[str, int]:
    """Write a tokenizer that ends and pads with one token, as SigLIP's; it keeps capitals."""
    return unigram(folder, ("<unk>", "</s>"), "$A </s>", room=room, pad="</s>", end="</s>")


def gemma_tokenizer(folder: Path, room: int = 12) -> dict[str, int]:
    """Write a byte-pair tokenizer with Gemma's special tokens in Gemma's places."""
    from tokenizers import Tokenizer, models, normalizers, processors

    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g")]
    tokens = [*specials, *letters, *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token", "mask_token"), specials, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=room, padding_side="right", **names
    )
    fast.save_pretrained(str(folder))
    return {"vocab_size": len(fast), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def bert_tokenizer(folder: Path) -> dict[str, int]:
    """Write a WordPiece tokenizer."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"bcdefghijklmnopqrstuvwxyz"]
    tokens += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    kind = getattr(transformers, "BertTokenizerFast", None) or transformers.BertTokenizer
    kind.from_pretrained(str(folder), model_max_length=20).save_pretrained(str(folder))
    return {"vocab_size": len(tokens), "pad_token_id": 0}


# Processors


def write_processor(folder: Path, kind: str, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **settings}))


def clip_processor(folder: Path, side: int = SIDE) -> None:
    write_processor(
        folder,
        "CLIPImageProcessor",
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
        resample=3,
    )


def square_processor(folder: Path, kind: str, *, resample: int = 2, side: int = SIDE) -> None:
    half = [0.5, 0.5, 0.5]
    size = {"height": side, "width": side}
    write_processor(folder, kind, size=size, resample=resample, image_mean=half, image_std=half)


# Whole folders

_TEXT = {"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip(folder: Path, **over: Any) -> Any:
    tokens = clip_tokenizer(folder) | over
    config = transformers.CLIPConfig(
        vision_config=VISION, text_config={**_TEXT, "max_position_embeddings": 16, **tokens}, projection_dim=12
    )
    clip_processor(folder)
    return transformers.CLIPModel(config)


def metaclip2(folder: Path) -> Any:
    tokens = roberta_tokenizer(folder, 16)
    config = transformers.MetaClip2Config(
        vision_config=VISION, text_config={**_TEXT, "max_position_embeddings": 16, **tokens}, projection_dim=12
    )
    clip_processor(folder)
    return transformers.MetaClip2Model(config)


def siglip(folder: Path) -> Any:
    tokens = siglip_tokenizer(folder)
    text = {**_TEXT, "hidden_size": 24, "max_position_embeddings": 12, **tokens}
    square_processor(folder, "SiglipImageProcessor")
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))


def siglip2(folder: Path) -> Any:
    tokens = gemma_tokenizer(folder)
    text = {**_TEXT, "hidden_size": 24, "max_position_embeddings": 12, **tokens}
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 9}
    # 7 patches hold a square of 2 by 2.
    write_processor(folder, "Siglip2ImageProcessor", patch_size=PATCH, max_num_patches=7, resample=2)
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))


def altclip(folder: Path) -> Any:
    tokens = roberta_tokenizer(folder, 16)
    text = {**_TEXT, "max_position_embeddings": 18, "project_dim": 12, **tokens}
    clip_processor(folder)
    config = transformers.AltCLIPConfig(vision_config=VISION, text_config=text, projection_dim=12)
    return transformers.AltCLIPModel(config)


def chinese_clip(folder: Path) -> Any:
    tokens = bert_tokenizer(folder)
    text = {**_TEXT, "max_position_embeddings": 20, **tokens}
    square_processor(folder, "ChineseCLIPImageProcessor", resample=3)
    processor = json.loads((folder / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = transformers.ChineseCLIPConfig(vision_config=VISION, text_config=text, projection_dim=12)
    return transformers.ChineseCLIPModel(config)


def clip_vision(folder: Path) -> Any:
    clip_processor(folder)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def clip_vision_projected(folder: Path) -> Any:
    clip_processor(folder)
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=12))


def siglip_vision(folder: Path) -> Any:
    square_processor(folder, "SiglipImageProcessor")
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def vit(folder: Path) -> Any:
    square_processor(folder, "ViTImageProcessor")
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def dinov2(folder: Path) -> Any:
    # Resized to 20 pixels, of which 16 are cut out, as the published ones take 224 of 256.
    write_processor(
        folder,
        "BitImageProcessor",
        size={"shortest_edge": 20},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    config = {**VISION, "mlp_ratio": 2}
    config.pop("intermediate_size")
    return transformers.Dinov2Model(transformers.Dinov2Config(**config))


PAIRS: dict[str, Callable[[Path], Any]] = {
    "clip": clip,
    "metaclip2": metaclip2,
    "siglip": siglip,
    "siglip2": siglip2,
    "altclip": altclip,
    "chinese_clip": chinese_clip,
}
TOWERS: dict[str, Callable[[Path], Any]] = {
    "clip_vision": clip_vision,
    "clip_vision_projected": clip_vision_projected,
    "siglip_vision": siglip_vision,
    "vit": vit,
    "dinov2": dinov2,
}


# A LLaVA: an image tower, a projector and a language model

LLAVA_WORDS = ("what", "is", "it", "describe", "picture", "animal", "hot", *WORDS)


def word_tokenizer(folder: Path, template: str | None) -> dict[str, int]:
    """Write a tokenizer of whole words, with the chat template given."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT"]
    vocab = {word: number for number, word in enumerate([*specials, ":", "?", ".", *LLAVA_WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER", "ASSISTANT"],
    )
    made.chat_template = template
    made.save_pretrained(str(folder))
    return {"vocab_size": len(vocab), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llava(folder: Path, *, siglip: bool = False, template: str | None = None, **over: Any) -> Any:
    """Write a LLaVA-1.5 in small: CLIP's tower without its first token, or SigLIP's with all of them."""
    tokens = word_tokenizer(folder, template)
    if siglip:
        square_processor(folder, "SiglipImageProcessor")
        vision: Any = transformers.SiglipVisionConfig(**VISION)
    else:
        clip_processor(folder)
        vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(
        **_TEXT, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, **tokens
    )
    told = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": 3,
        "image_seq_length": (SIDE // PATCH) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
    }
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**told | over))


MULTIMODAL: dict[str, Callable[..., Any]] = {"llava": llava}


def make(folder: Path, kind: str, *, seed: int = 0, **over: Any) -> Any:
    """Write a folder with a model of a kind, and return the model."""
    folder.mkdir(parents=True)
    model = lively((PAIRS | TOWERS | MULTIMODAL)[kind](folder, **over), seed)
    model.save_pretrained(str(folder))
    return model
