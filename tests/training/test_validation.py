"""What is held out to validate on: whole groups, a tenth at most, and a reason where that is nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from robustvlm.data import DataSource, Sample, select
from robustvlm.errors import UserError
from robustvlm.training.validation import held_out, some_held_out


class Grouped(DataSource):
    """Images of which those of one group show the same thing; the name of one begins with that of its group."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__("grouped", ["a", "b"])
        self.names = [f"{group}/{number}" for group, size in sizes.items() for number in range(size)]

    def group(self, image_id: str) -> str:
        return image_id.split("/")[0]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample]:
        yield from (Sample(name, Image.new("RGB", (2, 2)), 0) for name in self.names if keep(name))


def sizes(first: int, others: int) -> dict[str, int]:
    """Twenty groups, of which the one that comes first in the order of choice has a size of its own."""
    names = [f"g{number}" for number in range(20)]
    chosen = select(names, None)[0]
    return {name: first if name == chosen else others for name in names}


def test_a_group_without_room_is_passed_over_until_one_is_chosen() -> None:
    """Behind a first choice nothing changes: what was held out before still is."""
    large_first = Grouped(sizes(5, 1))
    order = select(sizes(5, 1), None)
    assert held_out(large_first, large_first.names, 2) == {f"{name}/0" for name in order[1:3]}
    small_first = Grouped({name: 1 if name == order[0] else 5 for name in order} | {order[2]: 1})
    assert held_out(small_first, small_first.names, 3) == {f"{order[0]}/0"}


def test_the_limit_is_named_where_it_is_the_reason() -> None:
    source = Grouped(sizes(4, 4))
    assert len(some_held_out(source, source.names, 4, data="mine")) == 4
    with pytest.raises(
        UserError, match=r"of 'mine' .* groups of 4 or more, .* val_limit is 3: pass val_limit=4 or more"
    ):
        some_held_out(source, source.names, 3, data="mine")
    with pytest.raises(UserError, match=r"'mine' is too small \(32 images\) to hold a part out: pass val=DATA"):
        some_held_out(source, source.names[:32], 3, data="mine")
