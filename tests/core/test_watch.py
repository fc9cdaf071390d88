"""The wire between processes: a death is known at once, a failure is passed on, nobody waits for one that has left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from torch.distributed import HashStore

from robustvlm.core.link import Link, PeerFailed, Watch
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError
from robustvlm.training.distributed import process_group

SECONDS = 10.0


@pytest.fixture
def wires() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def joined(stack: ExitStack, size: int, **options: Any) -> list[Watch]:
    store = HashStore()
    found = [Watch(rank, size, "127.0.0.1", store, **options) for rank in range(size)]
    for watch in found:
        stack.callback(watch.close)
    assert found[0].wait_for(lambda: len(found[0]._peers) == size - 1, seconds=SECONDS)
    assert found[0].wait_for(lambda: all(p.rank is not None for p in found[0]._peers.values()), seconds=SECONDS)
    return found


def die(watch: Watch) -> None:
    """What the operating system does to the wires of a process that is killed."""
    watch._closing.set()
    watch._thread.join()
    watch._drop()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_death_is_known_to_all_at_once(wires: ExitStack, victim: int) -> None:
    watches = joined(wires, 3, leave=lambda _: None)
    die(watches[victim])
    for rank, watch in enumerate(watches):
        if rank != victim:
            assert watch.wait_for(lambda watch=watch: watch.trouble is not None, seconds=SECONDS)
            expected = f"rank {victim} of 3 has died; what is finished is kept: repeat the command to go on"
            assert (watch.trouble, watch.failed_in_words) == (expected, False)


def test_a_failure_is_passed_on_and_leaving_is_none(wires: ExitStack) -> None:
    watches = joined(wires, 3, leave=lambda _: None)
    watches[1].fail()
    for watch in (watches[0], watches[2]):
        assert watch.wait_for(lambda watch=watch: watch.trouble is not None, seconds=SECONDS)
        assert watch.failed_in_words
    assert watches[1].trouble is None
    calm = joined(wires, 3)
    calm[2].close()
    assert calm[1].wait_for(lambda: calm[1].left == {2} == calm[0].left, seconds=SECONDS)
    assert calm[0].trouble is calm[1].trouble is None


def test_a_process_that_cannot_be_told_is_ended_with_one_line(wires: ExitStack) -> None:
    ends: list[str | None] = []
    watches = joined(wires, 2, grace=0.1, leave=ends.append)
    die(watches[1])
    assert watches[0].wait_for(lambda: len(ends) == 1, seconds=SECONDS)
    assert ends == ["rank 1 of 2 has died; what is finished is kept: repeat the command to go on"]
    # A process that failed has said why; the ones it takes along add nothing.
    ends.clear()
    watches = joined(wires, 2, grace=0.1, leave=ends.append)
    watches[1].fail()
    assert watches[0].wait_for(lambda: ends == [None], seconds=SECONDS)


def test_one_that_is_ending_by_itself_gets_time_and_is_not_spoken_for(wires: ExitStack) -> None:
    ends: list[str | None] = []
    watches = joined(wires, 2, grace=1.0, leave=ends.append)
    die(watches[1])
    assert watches[0].wait_for(lambda: watches[0].trouble is not None, seconds=SECONDS)
    time.sleep(0.5)
    watches[0].ends_itself()
    time.sleep(0.7)
    assert ends == [], "the time counts from when it said so"
    assert watches[0].wait_for(lambda: ends == [None], seconds=SECONDS)


def test_a_process_that_has_said_why_ends_at_once_where_another_is_lost(
    wires: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Winding up a program takes a busy machine seconds; torchrun's SIGTERM meanwhile must not raise."""
    kept = signal.getsignal(signal.SIGTERM)
    for lost, ended in ((True, [None]), (False, [])):
        ends: list[str | None] = []
        watches = joined(wires, 2, leave=ends.append)
        link = Link(HashStore(), rank=0, size=2, watch=watches[0])
        monkeypatch.setattr(link, "_farewell", lambda: 0.1)
        if lost:
            die(watches[1])
            assert watches[0].wait_for(lambda w=watches[0]: w.trouble is not None, seconds=SECONDS)
        assert link.fail("the reason")
        try:
            link._at_exit()
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        finally:
            signal.signal(signal.SIGTERM, kept)
        assert ends == ended


def test_a_closed_port_between_machines_is_named() -> None:
    store = HashStore()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        store.set("watch", f"{taken.getsockname()[1]} secret")
        with pytest.raises(OSError, match=rf"refused at port {taken.getsockname()[1]} of rank 0's machine"):
            Watch(1, 2, "127.0.0.1", store)


def test_one_that_is_silent_on_a_standing_wire_is_given_up(wires: ExitStack) -> None:
    watches = joined(wires, 2, leave=lambda _: None)
    watches[1]._closing.set()  # its thread stops, as that of a process under SIGSTOP; its wires stand
    watches[1]._thread.join()
    watches[0]._silence = 0.5
    assert watches[0].wait_for(lambda: watches[0].trouble is not None, seconds=SECONDS)
    assert str(watches[0].trouble).startswith("rank 1 of 2 is out of reach; what is finished is kept")


def test_strangers_are_not_heard(wires: ExitStack) -> None:
    watches = joined(wires, 2, leave=lambda _: None)
    port = watches[0]._listener.getsockname()[1]  # type: ignore[union-attr]
    for words in (b"lost 1\n", b"hello wrong 1\nfailed 1\n", b"x" * 5000, b"\xff\x00\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
    time.sleep(0.1)
    die(watches[1])
    assert watches[0].wait_for(lambda: watches[0].trouble is not None, seconds=SECONDS), "the true one is heard"
    assert not watches[0].failed_in_words


def test_a_barrier_ends_when_one_dies_or_leaves_before_it(wires: ExitStack) -> None:
    for end, message in ((die, "rank 1 of 2 has died"), (Watch.close, "rank 1 of 2 has ended before the others")):
        watches = joined(wires, 2, leave=lambda _: None)
        link = Link(HashStore(), rank=0, size=2, watch=watches[0])
        threading.Timer(0.1, end, [watches[1]]).start()
        began = time.monotonic()
        with pytest.raises(UserError, match=message):
            link.barrier()
        assert time.monotonic() - began < SECONDS
        link.close()
        assert time.monotonic() - began < SECONDS, "no farewell is waited for"


def test_a_broken_exchange_is_blamed_on_who_broke_it(wires: ExitStack) -> None:
    import torch

    watches = joined(wires, 2, leave=lambda _: None)
    store = HashStore()
    link = Link(store, rank=0, size=2, watch=watches[0])
    other = Link(store, rank=1, size=2)
    other.fail("the disk is full")
    watches[1].fail()
    group = process_group(Ranks(0, 2, 0, link), torch.device("cpu"))
    with pytest.raises(PeerFailed, match="rank 1 of 2 failed: the disk is full"):
        group.__exit__(RuntimeError, RuntimeError("Connection closed by peer"), None)
    link.close()
    other.close()


LOOP = """
import sys, time
from robustvlm.core.ranks import current_ranks
from robustvlm.errors import UserError
ranks = current_ranks()
ranks.barrier()
print("ready", flush=True)
try:
    while True:
        {work}
except UserError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


def by_hand(size: int, work: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    place["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    program = [sys.executable, "-c", LOOP.format(work=work)]
    return [
        subprocess.Popen(
            program,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | place | {"RANK": str(r)},
        )
        for r in range(size)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("work", ["time.sleep(0.01); ranks.check()", "ranks.barrier()", "time.sleep(1000)"])
def test_a_killed_process_ends_the_others_within_30_seconds(victim: int, work: str) -> None:
    processes = by_hand(2, work)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        processes[victim].send_signal(signal.SIGKILL)
        _, said = processes[1 - victim].communicate(timeout=30)
        assert processes[1 - victim].returncode == 2
        line = f"error: rank {victim} of 2 has died; what is finished is kept: repeat the command to go on"
        assert said.splitlines() == [line]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
