"""Noise chosen for each image: those that choose and those that are judged."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks.local_noise import halves
from robustvlm.data import open_data


def test_no_drawing_both_chooses_and_is_judged() -> None:
    source = open_data("emoji")
    groups = [source.group(sample.id) for sample in source.samples(limit=60)]
    assert set(groups[:30]) & set(groups[30:])  # what halves by place would share
    first, second = halves(groups)
    assert sorted([*first, *second]) == list(range(60))
    assert len(first) == 30
    assert not {groups[i] for i in first} & {groups[i] for i in second}


def test_images_of_their_own_are_halved_in_order() -> None:
    assert halves("abcdef") == ([0, 1, 2], [3, 4, 5])
    assert halves("aaaab") == ([4], [0, 1, 2, 3])
