"""Cut CLIP's byte-pair encoding to a small vocabulary: python -m tools.emoji.bpe"""

from __future__ import annotations

import gzip
from pathlib import Path

import open_clip
from open_clip.tokenizer import default_bpe

VOCABULARY = 4096
_BYTES = 2 * 256  # every byte, alone and as the end of a word
_SPECIAL = 2  # start and end of text
TARGET = Path(__file__).resolve().parents[2] / "robustvlm" / "assets" / "tiny" / "bpe_4096.txt.gz"


def main() -> None:
    """Write the header line and the first merges; check that open_clip reads the vocabulary back."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as full:
        lines = full.read().split("\n")
    merges = VOCABULARY - _BYTES - _SPECIAL
    # No newline at the end: open_clip would read it as one more, empty merge and shift the special tokens.
    text = "\n".join(lines[: 1 + merges])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        packed.write(text.encode("utf-8"))
    size = open_clip.SimpleTokenizer(bpe_path=str(TARGET), context_length=24).vocab_size
    if size != VOCABULARY:
        raise SystemExit(f"expected a vocabulary of {VOCABULARY}, got {size}")
    print(f"{TARGET.name}: {merges} merges, vocabulary {size}")


if __name__ == "__main__":
    main()
