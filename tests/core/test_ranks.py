"""Several processes as one: the work is dealt out whole, nobody waits for the dead, one failure ends all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from robustvlm.core.link import Link, PeerFailed
from robustvlm.core.ranks import Ranks, _address, current_ranks, read_environment
from robustvlm.errors import UserError


def in_threads(size: int, act: Callable[[Link], Any], **options: Any) -> list[Any]:
    """Run `act` once per rank, side by side; return what each returned or raised."""
    store, found = HashStore(), [None] * size

    def work(rank: int) -> None:
        link = Link(store, rank=rank, size=size, **options)
        try:
            found[rank] = act(link)
        except UserError as error:
            found[rank] = error  # type: ignore[call-overload]
        finally:
            link.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a process hangs"
    return found


@given(size=st.integers(1, 9), count=st.integers(0, 50))
def test_every_piece_is_exactly_one_rank_s_and_shares_are_even(size: int, count: int) -> None:
    shares = [[index for index in range(count) if Ranks(rank, size).mine(index)] for rank in range(size)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"RANK": "3"}, (0, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"WORLD_SIZE": " 4 ", "RANK": "3"}, (3, 4, 3)),
    ],
)
def test_the_environment_names_the_place(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    place = read_environment(environment)
    assert (place.rank, place.size, place.local_rank) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'.* torchrun"),
        ({"WORLD_SIZE": "0"}, "at least 1"),
        ({"WORLD_SIZE": "-2"}, "whole number"),
        ({"WORLD_SIZE": "1_0", "RANK": "0"}, "whole number"),
        ({"WORLD_SIZE": "2"}, "not RANK: start the processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks go from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_bad_values_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_environment(environment)


def test_an_environment_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="not MASTER_ADDR"):
        current_ranks()
    with pytest.raises(UserError, match="MASTER_PORT='http'"):
        _address({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"})


def test_nobody_passes_a_barrier_before_the_last_arrives() -> None:
    arrived = []

    def act(link: Link) -> int:
        seen = 0
        for _ in range(3):
            time.sleep(0.02 * link.rank)
            arrived.append(link.rank)
            link.barrier()
            seen = len(arrived)
            link.barrier()
        return seen

    assert in_threads(3, act) == [9, 9, 9]


def test_a_text_of_rank_0_reaches_all() -> None:
    assert (
        in_threads(3, lambda link: [link.share(f"a{link.rank}"), link.share("ü" if link.rank == 0 else None)])
        == [["a0", "ü"]] * 3
    )


def test_what_each_says_reaches_all_by_rank() -> None:
    said = in_threads(3, lambda link: link.gathered(f"a{link.rank}") + link.gathered(""))
    assert said == [["a0", "a1", "a2", "", "", ""]] * 3
    assert Ranks().gathered("alone") == ["alone"]


def test_a_store_out_of_reach_keeps_nobody_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a pulled cable it neither answers nor fails."""
    monkeypatch.setattr("robustvlm.core.link._LAST_SECONDS", 0.2)
    out_of_reach, over = threading.Event(), threading.Event()

    class Far(HashStore):
        def add(self, key: str, more: int) -> int:
            if out_of_reach.is_set():
                over.wait(60)
            return super().add(key, more)

    link = Link(Far(), rank=0, size=2)
    monkeypatch.setattr(link, "_farewell", lambda: 0.2)
    out_of_reach.set()
    began = time.monotonic()
    assert link.fail("rank 1 of 2 has died"), "then this process speaks for itself"
    link.close()
    assert time.monotonic() - began < 10
    over.set()


def test_one_failure_ends_the_wait_of_all_and_only_the_first_speaks() -> None:
    def act(link: Link) -> bool:
        if link.rank == 1:
            return link.fail("no such file")
        link.barrier()
        return False

    first, spoke, third = in_threads(3, act)
    assert spoke is True
    for error in (first, third):
        assert isinstance(error, PeerFailed)
        assert str(error) == "rank 1 of 3 failed: no such file"
    spoke = in_threads(4, lambda link: (link.fail("all alike"), link.fail("on its way up")))
    assert sorted(spoke) == [(False, False)] * 3 + [(True, True)]


def test_a_rank_that_falls_silent_is_named() -> None:
    def act(link: Link) -> None:
        if link.rank == 0:
            link.barrier()

    waiting, _ = in_threads(2, act, silence=1.0)
    assert isinstance(waiting, UserError)
    assert "rank 1 of 2 has given no sign of life" in str(waiting)


def test_a_lost_store_is_one_line() -> None:
    class Broken(HashStore):
        def add(self, *_: Any) -> int:
            raise RuntimeError("Connection reset by peer\nstack of somebody")

    link = Link(Broken(), rank=0, size=2)
    with pytest.raises(UserError, match=r"is lost \(Connection reset by peer\)$"):
        link.barrier()
    assert link.fail("whom could I tell?"), "then this process speaks for itself"
    link.close()


def test_every_purpose_has_keys_of_its_own() -> None:
    link = Link(HashStore(), rank=0, size=1)
    link.store_for("training").set("key", "value")
    assert link.store_for("training").check(["key"])
    assert not link.store_for("other").check(["key"])
    link.close()
