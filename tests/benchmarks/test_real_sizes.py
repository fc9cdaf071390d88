"""The benchmark of real sizes runs on a made-up model, and ends with exit code 1 above a limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import real_sizes

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_it_counts_and_refuses_what_is_above_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "small.json", tmp_path / "sizes.json"
    model.write_text(json.dumps(SMALL))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # put back afterwards
    words = ["real_sizes", "--models", str(model), "--classes", "6", "--commands", "load,attack", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    texts, images, hashed, memory = real_sizes.LIMITS["attack"]
    monkeypatch.setitem(real_sizes.LIMITS, "attack", (texts, 1, hashed, memory))
    with pytest.raises(SystemExit) as ended:
        real_sizes.main()
    load, attack = json.loads(out.read_text())
    assert str(ended.value) == f"small attack: image rows {attack['images']:.2f}, at most 1.00"
    # Six classes of one prompt, and the first of them once more: no other text is encoded twice.
    assert (load["texts"], load["images"]) == (7, 0)
    assert attack["texts"] <= 6
    assert 2 * 3 <= attack["images"] <= images
    assert f"| {attack['texts']} | {attack['images']} |" in capfd.readouterr().out
