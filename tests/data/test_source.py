"""Selection, limits and fingerprints that all sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robustvlm.data.source import DataSource, Sample, Unreadable, select
from robustvlm.data.splits import same_images
from robustvlm.errors import UserError

IDS = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=40)


class Listed(DataSource):
    """`count` images, of which every fifth is unreadable; it notes what it decodes."""

    def __init__(self, count: int, *, streaming: bool = False, labels: int = 3) -> None:
        super().__init__("listed", ["a", "b", "c"])
        self.count, self.streaming, self.labels = count, streaming, labels
        self.asked: list[str] = []
        self.decoded: list[str] = []

    def ids(self) -> list[str] | None:
        return None if self.streaming else [f"{i}" for i in range(self.count)]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for i in range(self.count):
            self.asked.append(f"{i}")
            if keep(f"{i}"):
                self.decoded.append(f"{i}")
                yield (
                    Unreadable(f"{i}", "torn")
                    if i % 5 == 4
                    else Sample(f"{i}", Image.new("RGB", (1, 1)), i % self.labels)
                )


@given(IDS, st.integers(0, 50), st.integers(0, 50))
def test_selection_is_nested_and_ignores_order(ids: list[str], small: int, large: int) -> None:
    small, large = sorted((small, large))
    chosen = select(ids, large)
    assert select(reversed(ids), small) == chosen[:small]
    assert len(chosen) == min(large, len(ids))
    assert set(chosen) <= set(ids)
    assert select(ids, None)[:small] == chosen[:small]


def test_selection_is_close_to_uniform() -> None:
    ids = [f"class-{i // 100}/{i}" for i in range(1000)]
    per_class = [sum(name.startswith(f"class-{c}/") for name in select(ids, 300)) for c in range(10)]
    assert min(per_class) > 15
    assert max(per_class) < 45


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_sees_the_same_images(streaming: bool) -> None:
    whole = [item.id for item in Listed(50, streaming=streaming).samples(limit=20)]
    done = set(whole[:7])
    rest = Listed(50, streaming=streaming)
    assert [item.id for item in rest.samples(limit=20, keep=lambda name: name not in done)] == whole[7:]
    assert rest.decoded == whole[7:]
    assert len(whole) == 20


def test_samples_come_in_source_order_and_only_kept_ones_are_decoded() -> None:
    source = Listed(40)
    got = [item.id for item in source.samples(limit=10)]
    assert got == sorted(got, key=int)
    assert set(got) == set(select(source.ids() or [], 10))
    assert source.decoded == got


def test_a_stream_is_not_read_beyond_its_limit() -> None:
    source = Listed(1000, streaming=True)
    assert [item.id for item in source.samples(limit=3, keep=lambda name: name != "2")] == ["0", "1"]
    assert len(source.asked) <= 4


def test_a_label_without_class_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"label 3 \(3\) but 3 class names"):
        list(Listed(10, labels=4).samples())


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1 image, got 0"):
        list(Listed(3).samples(limit=0))


def test_fingerprint_follows_ids_and_class_names() -> None:
    first, same, longer, renamed = Listed(5), Listed(5), Listed(6), Listed(5)
    renamed.class_names = ("a", "b", "d")
    assert first.fingerprint() == same.fingerprint()
    assert len({first.fingerprint(), longer.fingerprint(), renamed.fingerprint()}) == 3


PHOTOS = {"fingerprint": "ab", "class_names": ["cat", "dog"], "content": "11", "images": 9}


@pytest.mark.parametrize(
    ("first", "second", "facts", "same"),
    [
        ("parquet:a?subgroup=style", "parquet:a", {"fingerprint": "cd"}, True),
        ("parquet:a?captions=text", "parquet:a?subgroup=style", {"fingerprint": "cd", "content": None}, True),
        ("parquet:a?subgroup=style", "parquet:b", {"fingerprint": "cd"}, True),
        ("parquet:a?subgroup=style", "parquet:b", {"fingerprint": "cd", "content": None}, False),
        ("parquet:a?subgroup=style", "parquet:a", {"fingerprint": "cd", "content": "22"}, False),
        ("parquet:a?subgroup=style", "parquet:a", {"fingerprint": "cd", "images": 8}, False),
        ("parquet:a", "parquet:b", {"fingerprint": "cd"}, False),  # beyond the images that the digest looks at
        ("parquet:a?image=small", "parquet:a?image=large", {"fingerprint": "cd", "content": None}, False),
        ("hf:a?captions=text", "hf:a?subgroup=style", {"fingerprint": "cd"}, True),
        ("hf:a?label=coarse", "hf:a?label=fine", {"fingerprint": "cd", "class_names": ["pet"]}, False),
        ("hf:a?label=coarse", "hf:a", {}, True),
        ("hf:a?streaming=1", "hf:a?streaming=1&config=b", {"content": None}, False),
        ("wds:a", "wds:a?captions=txt", {"fingerprint": "cd"}, True),
        ("wds:a?image=jpg", "wds:a?image=png", {}, False),
        ("wds:https://one/{0..9}.tar", "wds:https://other/{0..9}.tar", {"content": None}, False),
        ("torchvision:CIFAR10:data", "torchvision:CIFAR10:data?download=1", {"class_names": ["a", "b"]}, True),
    ],
)
def test_what_is_read_of_images_makes_no_other_images(
    first: str, second: str, facts: dict[str, object], same: bool
) -> None:
    one, other = PHOTOS | {"spec": first}, PHOTOS | {"spec": second} | facts
    assert same_images(one, other) is same_images(other, one) is same
