"""Short ways to make attack runs in tests, to interrupt them, and to compare what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from robustvlm.commands.attack import ATTACK, AttackSettings
from robustvlm.commands.attack.summary import Summary
from robustvlm.commands.attack.work import AttackWork
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer

CURVE = {"attack": "pgd:steps=6,apgd-t:steps=4", "eps": "1/255,2/255,4/255", "lanes": 8}


class Interrupt(Observer):
    """Presses Ctrl-C when `images` images are done, over all stages of this session."""

    def __init__(self, images: int) -> None:
        self.left = images

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


class Attacking(Run):
    """A run of the command, made as from Python; `run` starts it or goes on with it, under a budget if one is given."""

    work: AttackWork

    def __init__(self, **options: Any) -> None:
        self.options = options
        super().__init__(ATTACK, AttackSettings(**options))

    def run(self, observer: Observer | None = None, *, budget: str | None = None, **how: bool) -> Summary:
        run = self if budget is None else Attacking(**self.options, budget=budget)
        summary: Summary = run.start(observer, **how).summary
        return summary


def prepared(photos: Path, model: str = "Encoder", *, data: str | None = None, **settings: Any) -> Attacking:
    """Prepare a run on an image folder; it is named "run" and lies in "runs" beside the folder.

    Without the checks that cost passes, to be quick.
    """
    settings = {"attack": "pgd:steps=6", "eps": "2/255", "lanes": 8, "name": "run", "checks": "none", **settings}
    settings.setdefault("out", photos.parent / "runs")
    return Attacking(
        model=f"small_encoders:{model}", data=data or f"imagefolder:{photos}?empty=1", device="cpu", **settings
    )


def run_in_pieces(make: Any, pieces: list[int]) -> Attacking:
    """Run with an interruption after each number of images, then to the end; return the last session's run."""
    for images in pieces:
        try:
            make().run(Interrupt(images))
        except KeyboardInterrupt:
            continue
    last: Attacking = make()
    last.run()
    return last


def table(run: Attacking) -> pa.Table:
    """Return the result rows without their timings."""
    return pq.read_table(run.folder.results_path).drop_columns(["seconds"])


def rows(run: Attacking) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(run).to_pylist()
    return found


def outcomes(run: Attacking) -> list[tuple[Any, ...]]:
    """Return what was decided for every image, attack and eps."""
    keys = ("image_id", "attack", "eps", "outcome", "clean_prediction")
    return [tuple(row[key] for key in keys) for row in rows(run)]


def pictures(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, list[float]]]]:
    """Return metadata and tensors of every file, by name; anything else in the folder is listed as well."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), tensors)
    return found
