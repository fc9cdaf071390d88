"""The benchmark of two machines: its machines are two, and without root it says in one line what it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import two_machines

_ABLE = sys.platform == "linux" and os.geteuid() == 0 and two_machines._ip()
_SERVE = "import socket; s = socket.create_server(('', 5000)); print(s.accept()[1][0], socket.gethostname())"
_CALL = """
import socket, time
for _ in range(100):
    try:
        socket.create_connection(("machine-a", 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["two_machines"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert two_machines.main() == 2
    said = capsys.readouterr().out
    assert said.startswith("error: network namespaces are made by root")
    assert said.count("\n") == 1


@pytest.mark.skipif(not _ABLE, reason="network namespaces need root, Linux and ip")
def test_two_machines_have_names_and_meet_over_their_cables(tmp_path: Path) -> None:
    with two_machines.network(tmp_path) as made:
        environment = dict(os.environ)
        server = made.machines["a"].start([sys.executable, "-c", _SERVE], tmp_path, environment)
        client = made.machines["b"].start([sys.executable, "-c", _CALL], tmp_path, environment)
        assert (client.wait(60), server.wait(60)) == (0, 0), (tmp_path / "b.txt").read_text()
        assert (tmp_path / "a.txt").read_text() == "10.77.0.2 machine-a\n"
        made.plug("b", into=False)
        waiting = made.machines["a"].start([sys.executable, "-c", _SERVE], tmp_path, environment)
        cut_off = made.machines["b"].start([sys.executable, "-c", _CALL], tmp_path, environment)
        with pytest.raises(two_machines.subprocess.TimeoutExpired):
            cut_off.wait(1)
        made.machines["b"].kill()
        made.machines["a"].kill()
        assert cut_off.wait(10) == waiting.wait(10) == -9
