"""Do two machines share a run as two processes of one do, and what becomes of it when one of them is lost?

    python -m benchmarks.two_machines                 Linux, as root, with `ip` of iproute2

Makes two machines of this one: network namespaces with host names of their own, each on a cable to a switch, and one
folder that both see. `torchrun --nnodes 2` runs on them by its static rendezvous (`--master-addr`) and by c10d, whose
store is then on the machine that rank 0 is not on. Prints two Markdown tables; the exit code is 1 where anything is not
as it should be.

* **Same**: result rows of two machines against those of one process, but for their timings.
* **Lost**: one machine is killed, every process on it at once; or its cable is pulled at the switch, so that nobody is
  told anything. The others must end within 30 s, each rank with one line that says why; then the same command goes on
  alone, to the results of a run that nothing has happened to. torchrun must end too, except where the machine with its
  c10d store is cut off: it then waits until the system gives the connection up, which takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import markdown
from benchmarks.torture.compare import differences

LONGEST = 30.0
RUN = Path("runs") / "r"
_ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "attack": "attack tiny --data emoji --attack pgd:steps=40 --eps 1/255 --checks none --limit 24 --lanes 8",
    "certify": "certify tiny --data emoji --claim class --sigma 0.05 --samples 800 --limit 12 --lanes 32",
    "finetune": "finetune tiny --data emoji --method tecoa --steps 40 --batch-size 8 --limit 32 --checkpoint-every 2 "
    "--val-limit 8 --val-steps 1 --inner-steps 4 --validate-every 20",
}
# Training adds up the gradients of two ranks in another order than one rank would: its weights are not compared.
_SAME = ("attack", "certify")
RENDEZVOUS = ("static", "c10d")
_LOSSES = (
    ("attack", "static", "b", "cut off"),
    ("attack", "c10d", "b", "cut off"),
    ("attack", "static", "a", "killed"),
    ("attack", "c10d", "b", "killed"),
    ("attack", "static", "b", "killed"),
    ("attack", "c10d", "a", "killed"),
    ("certify", "static", "a", "killed"),
    ("certify", "static", "b", "cut off"),
    ("finetune", "static", "b", "killed"),
    ("finetune", "static", "b", "cut off"),
)
_LOST_HEADER = (
    "command",
    "rendezvous",
    "machine",
    "ranks ended after, s",
    "torchrun ended after, s",
    "lines",
    "repeated alone",
    "wrong",
)
_PORT = 29400
_BEGUN = 4
"""Lines of a journal, or steps, after which a run is well under way."""
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Machine:
    """A network namespace that passes for a machine; `letter` is a or b, and a has rank 0."""

    letter: str
    namespace: str
    hosts: Path

    @property
    def name(self) -> str:
        return f"machine-{self.letter}"

    def start(self, command: Sequence[str], place: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on the machine, in a folder, where a file gets what it says on both streams."""
        # A host name and a table of hosts of its own, as two machines have: torchrun tells the others its host's name.
        enter = 'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        shell = ["unshare", "--uts", "--mount", "sh", "-c", enter, self.name, str(self.hosts)]
        with (place / f"{self.letter}.txt").open("wb") as out:
            return subprocess.Popen(
                [_ip(), "netns", "exec", self.namespace, *shell, *command],
                stdout=out,
                stderr=out,
                cwd=place,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill every process on it at once."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def has_ranks(self) -> bool:
        """Whether a process of the run still lives on it, torchrun aside."""
        for pid in self._pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"robustvlm" in words and b"torch.distributed.run" not in words:
                    return True
        return False

    def _pids(self) -> list[int]:
        return [int(pid) for pid in _told("netns", "pids", self.namespace).split()]


@dataclass(frozen=True)
class Network:
    """Two machines on a switch."""

    machines: dict[str, Machine]
    switch: str

    def plug(self, letter: str, *, into: bool) -> None:
        """Pull a machine's cable out of the switch, or plug it in again; its own end stays up."""
        _told("-n", self.switch, "link", "set", "dev", f"port-{letter}", "up" if into else "down")


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Yield two machines, and take them down again with whatever still runs on them."""
    mark = f"rv{os.getpid()}"
    switch, hosts = f"{mark}s", folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 machine-a\n10.77.0.2 machine-b\n")
    machines = {letter: Machine(letter, f"{mark}{letter}", hosts) for letter in "ab"}
    made: list[str] = []
    try:
        for namespace in (switch, *(machine.namespace for machine in machines.values())):
            _told("netns", "add", namespace)
            made.append(namespace)
        _told("-n", switch, "link", "add", "bridge", "type", "bridge")
        _told("-n", switch, "link", "set", "bridge", "up")
        for number, (letter, machine) in enumerate(machines.items(), start=1):
            there = ("-n", machine.namespace)
            _told(*there, "link", "add", "eth0", "type", "veth", "peer", "name", f"port-{letter}", "netns", switch)
            # A lone letter would be taken for the beginning of one of ip's own words.
            _told("-n", switch, "link", "set", "dev", f"port-{letter}", "master", "bridge", "up")
            _told(*there, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _told(*there, "link", "set", device, "up")
        yield Network(machines, switch)
    finally:
        for machine in machines.values():
            if machine.namespace in made:
                machine.kill()
        for namespace in made:
            _told("netns", "delete", namespace)


def _ip() -> str:
    return shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or ""


def _told(*words: str) -> str:
    return subprocess.run([_ip(), *words], check=True, capture_output=True, text=True).stdout


@dataclass
class Lost:
    """What came of a run that lost a machine."""

    command: str
    rendezvous: str
    lost: str
    ranks: dict[str, float] = field(default_factory=dict)
    """Seconds until the rank has ended, by the machine on which it still could."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The same of torchrun."""
    lines: dict[str, list[str]] = field(default_factory=dict)
    """What the rank on it said of the end."""
    wrong: list[str] = field(default_factory=list)
    again: str = ""

    def row(self) -> list[str]:
        """Return its row of the table."""
        ranks, seconds = (_by_letter(found) for found in (self.ranks, self.seconds))
        lines = _by_letter({letter: len(said) for letter, said in self.lines.items()})
        return [self.command, self.rendezvous, self.lost, ranks, seconds, lines, self.again, "; ".join(self.wrong)]


def _by_letter(found: Mapping[str, float]) -> str:
    return ", ".join(f"{letter} {number:.3g}" for letter, number in sorted(found.items()))


class Bench:
    """A folder that both machines see, in which each run has a place of its own."""

    def __init__(self, folder: Path, machines: Network) -> None:
        self.folder, self.network = folder, machines
        paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.environment = os.environ | {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def place(self, name: str) -> Path:
        """Return a new place."""
        place = self.folder / name
        place.mkdir()
        return place

    def alone(self, command: str, place: Path) -> subprocess.CompletedProcess[str]:
        """Run a command in one process, without a network of its own."""
        line = [sys.executable, *_words(command)]
        return subprocess.run(line, cwd=place, env=self.environment, capture_output=True, text=True)

    def straight(self, command: str) -> Path:
        """Return the folder of a run in one process that nothing has happened to."""
        place = self.folder / f"{command}-alone"
        if not place.exists():
            done = self.alone(command, self.place(place.name))
            assert done.returncode == 0, done.stderr
        return place / RUN

    def start(self, command: str, place: Path, rendezvous: str) -> dict[str, subprocess.Popen[bytes]]:
        """Start a run on both machines by torchrun; what its ranks say lies in files of their own."""
        found = {}
        for node, (letter, machine) in enumerate(self.network.machines.items()):
            meet = ["--node-rank", str(node), "--master-addr", "machine-a", "--master-port", str(_PORT)]
            if rendezvous == "c10d":
                meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"machine-b:{_PORT}", "--rdzv-id", place.name]
            kept = ["--redirects", "3", "--log-dir", str(place / "logs" / letter)]
            line = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet, *kept]
            found[letter] = machine.start([sys.executable, *line, *_words(command)], place, self.environment)
        return found


def _words(command: str) -> list[str]:
    return ["-m", "robustvlm", *COMMANDS[command].split(), "--device", "cpu", "--name", RUN.name]


def _said(place: Path, letter: str) -> str:
    """Return what the rank on a machine has written to standard error."""
    files = (place / "logs" / letter).rglob("stderr.log")
    return "".join(path.read_text(errors="replace") for path in files)


def same(bench: Bench, command: str, rendezvous: str) -> list[str]:
    """Return what differs between a run on two machines and one in one process."""
    place = bench.place(f"{command}-{rendezvous}")
    for letter, process in bench.start(command, place, rendezvous).items():
        if process.wait() != 0:
            return [f"{letter} ended with exit code {process.returncode}: {_said(place, letter)[-300:]}"]
    journals = sorted(path.name for path in (place / RUN).glob("journal*.jsonl"))
    if journals != ["journal-1.jsonl", "journal.jsonl"]:
        return [f"journals: {journals}"]
    return differences(place / RUN, bench.straight(command))


def lose(bench: Bench, command: str, rendezvous: str, victim: str, how: str) -> Lost:
    """Lose a machine in the middle of a run, see how the other ends, and go on alone."""
    place = bench.place(f"{command}-{rendezvous}-{victim}-{how.replace(' ', '-')}")
    found = Lost(command, rendezvous, f"{victim} (rank {'ab'.index(victim)}) {how}")
    started = bench.start(command, place, rendezvous)
    if not _under_way(place / RUN, started, command):
        said = "; ".join(_said(place, letter)[-300:] for letter in started)
        found.wrong.append(f"it ended before anything was lost: {said}")
        return found
    began = time.monotonic()
    if how == "killed":
        bench.network.machines[victim].kill()
        started.pop(victim).wait()
    else:
        bench.network.plug(victim, into=False)
    _watch(bench.network, place, started, began, found)
    for machine in bench.network.machines.values():
        machine.kill()
    bench.network.plug(victim, into=True)
    _go_on(bench, command, place, found)
    return found


def _go_on(bench: Bench, command: str, place: Path, found: Lost) -> None:
    """Repeat the command in one process, and compare its results where that can be done to the bit."""
    again = bench.alone(command, place)
    found.again = "ends"
    if again.returncode != 0:
        found.again = f"exit code {again.returncode}"
        found.wrong.append(f"repeated alone: {again.stderr[-300:]}")
    elif command in _SAME:
        differ = differences(place / RUN, bench.straight(command))
        found.again = f"{len(differ)} differences" if differ else "the same results"
        found.wrong += differ[:1]


def _under_way(folder: Path, started: dict[str, subprocess.Popen[bytes]], command: str) -> bool:
    """Wait until both ranks are at work, as their journals or the training's checkpoints show."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and all(process.poll() is None for process in started.values()):
        if command == "finetune":
            if (folder / "last.safetensors").exists():
                return True
        elif all(_lines(folder / name) >= _BEGUN for name in ("journal.jsonl", "journal-1.jsonl")):
            return True
        time.sleep(0.05)
    return False


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _watch(
    machines: Network, place: Path, started: dict[str, subprocess.Popen[bytes]], began: float, found: Lost
) -> None:
    """Note when and how the machines that still could have ended."""
    while (late := time.monotonic() - began) < 2 * LONGEST and len(found.seconds) < len(started):
        for letter, process in started.items():
            if letter not in found.ranks and not machines.machines[letter].has_ranks():
                found.ranks[letter] = late
            if letter not in found.seconds and process.poll() is not None:
                found.seconds[letter] = late
        time.sleep(0.05)
    expected = "has died; " if found.lost.endswith("killed") else "is out of reach; "
    # torchrun itself asks a store of c10d without an end to its patience.
    patient = found.rendezvous == "c10d" and found.lost.endswith("cut off")
    for letter, process in started.items():
        said = _said(place, letter)
        found.lines[letter] = [line for line in said.splitlines() if line.startswith("error: ")]
        for what, seconds in (("rank", found.ranks), ("torchrun", found.seconds)):
            if seconds.get(letter, 2 * LONGEST) > LONGEST and (what, patient) != ("torchrun", True):
                found.wrong.append(f"{letter}: {what} took more than {LONGEST:.0f} s to end")
        if process.poll() == 0:
            found.wrong.append(f"{letter} ended as if all were well")
        if len(found.lines[letter]) != 1 or expected not in said or "Traceback" in said or "frame #" in said:
            found.wrong.append(f"{letter} said: {said[-500:]!r}")


def main() -> int:
    """Make the machines, run everything, print the tables; return 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="same,lost", help="same, lost, or both with a comma")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="of these, with commas")
    parser.add_argument("--rendezvous", default=",".join(RENDEZVOUS), help="of these, with commas")
    parser.add_argument("--out", type=Path, help="folder for the runs, kept [default: a temporary one]")
    options = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0 or not _ip():
        print("error: network namespaces are made by root, on Linux, with `ip`: install iproute2 and run it as root")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the machines are taken down then too
    with contextlib.ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder.resolve(), stack.enter_context(network(folder.resolve())))
        return _tables(bench, options)


def _tables(bench: Bench, options: argparse.Namespace) -> int:
    commands, ways = options.commands.split(","), options.rendezvous.split(",")
    wrong = 0
    if "same" in options.only:
        rows = []
        for command, way in ((command, way) for command in _SAME if command in commands for way in RENDEZVOUS):
            if way in ways:
                differ = same(bench, command, way)
                wrong += bool(differ)
                rows.append([command, way, "; ".join(differ[:3]) or "none"])
                print("; ".join(rows[-1]), file=sys.stderr, flush=True)
        print(markdown(("command", "rendezvous", "differences"), rows) + "\n", flush=True)
    if "lost" in options.only:
        found = []
        for command, way, victim, how in _LOSSES:
            if command in commands and way in ways:
                found.append(lose(bench, command, way, victim, how))
                print("; ".join(found[-1].row()), file=sys.stderr, flush=True)
        wrong += sum(bool(one.wrong) for one in found)
        print(markdown(_LOST_HEADER, [one.row() for one in found]))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
