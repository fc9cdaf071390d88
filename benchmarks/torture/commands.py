"""The commands that are tortured, each small enough to run hundreds of times, and what they need beforehand."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.torture.forking import Body, Ended, command, run_forked

_ATTACK = "--attack pgd:steps=3,apgd-ce:steps=3 --eps 1/255,2/255 --limit 8 --lanes 4 --checks quick"
_TRAINING = "--batch-size 8 --limit 32 --checkpoint-every 1"
_FINETUNE = f"--steps 3 {_TRAINING} --val-limit 8 --val-steps 1 --inner-steps 1 --validate-every 2"


@dataclass(frozen=True)
class Command:
    """A command line, whose results lie in the folder `result` of the place where it runs."""

    name: str
    line: str
    result: str = "runs/r"
    needs: tuple[str, ...] = ()
    """Names of the commands whose results must lie there beforehand."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


COMMANDS = (
    Command("attack", f"attack tiny {_ATTACK} --device cpu --name r --save-adversarial"),
    Command("certify", "certify tiny --claim class --sigma 0.05 --samples 64 --limit 4 --lanes 32 --name r"),
    Command("certify-cache", "certify tiny --samples 64 --limit 3 --lanes 32 --cache float16 --name r"),
    Command("detect", "detect tiny --limit 8 --fit-limit 16 --draws 100 --scores msp,energy --name r"),
    Command("finetune", f"finetune tiny --method tecoa {_FINETUNE} --name r"),
    Command("purify", f"purify tiny --sigma 0.12 --steps 3 --mapper-steps 3 {_TRAINING} --val-limit 4 --name r"),
    Command("immunize", "immunize tiny --shots 2 --steps 5 --name r"),
    Command("tune-prompts", "tune-prompts tiny --shots 1 --epochs 1 --name r"),
    Command("tuned", f"finetune tiny --method tecoa {_FINETUNE} --name tuned", "runs/tuned"),
    Command("soup", "soup runs/tuned tiny --val emoji --val-steps 1 --limit 8 --name r", needs=("tuned",)),
    Command("export", "export runs/tuned exported", "exported", needs=("tuned",)),
    Command("build", "build --encoder runs/tuned --smooth 0.05:4 --name r", needs=("tuned",)),
)
BY_NAME = {command.name: command for command in COMMANDS}


class Bench:
    """A folder in which commands run, each in a place of its own, with one warm cache for all.

    Args:
        root: the folder; timeout: seconds after which a command hangs.
        program: what runs the words of a command line; another program in tests of this one.
    """

    def __init__(self, root: Path, *, timeout: float, program: Callable[[Sequence[str]], Body] = command) -> None:
        self.root, self.timeout, self.program = root, timeout, program
        self.root.mkdir(parents=True, exist_ok=True)

    def place(self, name: str, needs: tuple[str, ...] = ()) -> Path:
        """Return a folder with the results of earlier commands in it."""
        place = self.root / name
        place.mkdir(parents=True)
        for need in needs:
            source = self.straight(BY_NAME[need]) / BY_NAME[need].result
            target = place / BY_NAME[need].result
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(source, target)
        return place

    def run(
        self,
        words: list[str],
        place: Path,
        *,
        prepare: Callable[[], object] = lambda: None,
        kill_after: float | None = None,
    ) -> Ended:
        """Run a command in its place."""
        environment = {"XDG_CACHE_HOME": str(self.root / "cache"), "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
        return run_forked(
            self.program(words),
            cwd=place,
            timeout=self.timeout,
            prepare=prepare,
            environment=environment,
            kill_after=kill_after,
        )

    def straight(self, item: Command, *, again: bool = False) -> Path:
        """Return the place of an uninterrupted run of this command, made once (or twice, to see what time changes)."""
        place = self.root / f"straight-{item.name}{'-again' if again else ''}"
        done = place.with_name(f".{place.name}.done")  # on disk, so that every worker knows of it
        if not done.exists():
            self.place(place.name, item.needs)
            ended = self.run(item.words, place)
            if ended.code != 0:
                raise SystemExit(f"robustvlm {item.line}: exit code {ended.code}\n{ended.err[-2000:]}")
            done.touch()
        return place


def _copy(source: Path, target: Path) -> None:
    """Copy a folder."""
    for folder, _, files in os.walk(source):
        into = target / Path(folder).relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for name in files:
            (into / name).write_bytes((Path(folder) / name).read_bytes())
