"""The commands of the benchmark, one a row: what is run, with which options, and what is read off."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import readings
from .readings import Reading

EPS = "0.05/255,0.1/255,0.25/255,0.5/255,1/255"


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the defaults make a table in about an hour of one core.

    Attributes:
        clean: images classified; attacked, levels: images under the curve and under the superclass goal.
        attack_steps: of APGD; certified, samples: images and noisy copies of each.
        smoothed, copies: images that the smoothed models classify, and noisy copies of each.
        tune_steps, tune_batch: of the fine-tuning; purify_steps, mapper_steps: of the purifier.
        validated: images of a validation in training.
        lanes: images a batch; a small number spares passes while the batch is tried out.
    """

    clean: int = 1000
    attacked: int = 100
    levels: int = 50
    attack_steps: int = 20
    certified: int = 4
    samples: int = 1000
    smoothed: int = 50
    copies: int = 16
    tune_steps: int = 700
    tune_batch: int = 16
    purify_steps: int = 60
    mapper_steps: int = 40
    validated: int = 32
    lanes: int = 16


QUICK = Sizes(
    clean=40, attacked=8, levels=4, attack_steps=3, certified=1, samples=200, smoothed=4, copies=2,
    tune_steps=4, tune_batch=4, purify_steps=2, mapper_steps=2, validated=4, lanes=4,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all rows share: the model, the folder of the parts, the folder of the runs, sizes, noise."""

    model: str
    data: Path
    out: Path
    sizes: Sizes
    superclasses: int
    sigma: float = 0.1
    tune_eps: str = "1/255"
    tune_lr: float = 1e-4

    def part(self, name: str) -> str:
        """Return the data spec of a part."""
        return f"parquet:{self.data / name}.parquet"

    def run(self, name: str) -> str:
        """Return the folder of an earlier row's run, which is a model spec."""
        return str(self.out / name)


@dataclass(frozen=True)
class Row:
    """One command: its verb, its options by their names in Python, and the reading of its result.

    Attributes:
        key: name of the row and of its run; of: the model that the table shows it under.
    """

    key: str
    of: str
    verb: str
    options: dict[str, Any]
    read: Callable[[Any], list[Reading]]

    @property
    def command(self) -> str:
        """The row on the command line."""
        words = ["robustvlm", self.verb]
        for name, value in self.options.items():
            flag = "--" + name.replace("_", "-")
            if name == "model":
                words.append(str(value))
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [
                    part for item in (value if isinstance(value, list) else [value]) for part in (flag, str(item))
                ]
        return shlex.join(words)


def rows(s: Setting) -> Iterator[Row]:
    """Yield every row, those first that others build on: the model as it is, then fine-tuned."""
    plain = "as it is"
    yield _row(s, "clean", plain, "evaluate", s.model, "photographs", readings.clean, limit=s.sizes.clean)
    yield from _measured(s, s.model, plain, "")
    yield _told_apart(s, "detect-all", plain, s.model, "")
    yield _told_apart(s, "immune-all", plain, s.run("immunity"), "", scores="own,mcm,max-logit")
    yield _row(
        s, "finetune", "fine-tuned", "finetune", s.model, "tune", readings.trained,
        method="benchmarks.photowords.method:ByWords", eps=s.tune_eps, inner_steps=1, lr=s.tune_lr,
        steps=s.sizes.tune_steps, batch_size=s.sizes.tune_batch, warmup=0.1,
        val_limit=s.sizes.validated, val_steps=5, validate_every=0.0,
    )  # fmt: skip
    yield from _measured(s, s.run("finetune"), "fine-tuned", "tuned-")


def _measured(s: Setting, model: str, of: str, prefix: str) -> Iterator[Row]:
    """Yield what is measured alike on both models, on photographs that neither was tuned on."""
    n = s.sizes

    def row(key: str, *rest: Any, **options: Any) -> Row:
        return _row(s, prefix + key, of, *rest, **options)

    attack = {"attack": f"apgd-ce:steps={n.attack_steps}", "checks": "quick", "lanes": n.lanes}
    yield row("held", "evaluate", model, "held", readings.clean, limit=n.clean)
    yield row("curve", "attack", model, "held", readings.curve, **attack, eps=EPS, limit=n.attacked)
    goal = {"goal": f"superclass:{s.superclasses}", "eps": "0.25/255,1/255"}
    yield row("superclass", "attack", model, "held", readings.curve, **attack, **goal, limit=n.levels)
    noise: dict[str, Any] = {"sigma": s.sigma, "samples": n.samples, "limit": n.certified, "lanes": n.lanes}
    noise["at"] = f"{s.sigma / 4:g},{s.sigma:g}"
    yield row("feature", "certify", model, "held", readings.certified, claim="feature", min_cos=0.5, **noise)
    yield row("class", "certify", model, "held", readings.certified, claim="class", **noise)
    yield _told_apart(s, f"{prefix}detect", of, model, "held-")
    images = {"no_images": True, "tree": s.data / "known-tree.json"}
    yield row("immunity", "immunize", model, "known", readings.antibodies, **images)
    immune = s.run(f"{prefix}immunity")
    yield _told_apart(s, f"{prefix}immune", of, immune, "held-", scores="own,mcm,max-logit")
    yield row(
        "purifier", "purify", model, "tune", readings.trained, sigma=[s.sigma], steps=n.purify_steps,
        mapper_steps=n.mapper_steps, batch_size=8, val_limit=n.validated, validate_every=0.0,
    )  # fmt: skip
    smooth = f"{s.sigma:g}:{n.copies}"
    for key, before in (("smooth", model), ("purified", s.run(f"{prefix}purifier"))):
        yield row(key, "evaluate", f"{before}+smooth:{smooth}", "held", readings.answers, limit=n.smoothed)
    parts = {"encoder": model, "purify": s.run(f"{prefix}purifier"), "immunize": immune, "smooth": smooth}
    yield Row(f"{prefix}pipeline", of, "build", parts | _where(s, f"{prefix}pipeline"), readings.put_together)
    whole = s.run(f"{prefix}pipeline")
    yield row("whole", "evaluate", whole, "held-known", readings.answers, limit=n.smoothed)


def _told_apart(s: Setting, key: str, of: str, model: str, which: str, **more: Any) -> Row:
    """Return the row that tells known classes from unknown ones: held-out photographs ("held-") or all of them ("")."""
    unknown = [f"{name}={s.part(which + name)}" for name in ("near", "far")]
    given: dict[str, Any] = {"id": s.part(f"{which}known"), "ood": unknown, "fit": "none", "limit": s.sizes.clean}
    return _row(s, key, of, "detect", model, None, readings.told_apart, **given, **more)


def _row(
    s: Setting, key: str, of: str, verb: str, model: str, data: str | None,
    read: Callable[[Any], list[Reading]], **options: Any,
) -> Row:  # fmt: skip
    given: dict[str, Any] = {"model": model}
    if data is not None:
        given["data"] = s.part(data)
    if verb != "purify":  # which reads no classes
        given["templates"] = s.data / "templates.txt"
    where = _where(s, key)
    return Row(key, of, verb, given | options | where, read)


def _where(s: Setting, name: str) -> dict[str, Any]:
    return {"out": s.out, "name": name}


def only(found: Iterator[Row], wanted: str | None) -> list[Row]:
    """Return the rows whose key is among `wanted` (names with commas between), all of them where it is None."""
    if wanted is None:
        return list(found)
    names = wanted.split(",")
    return [replace(row) for row in found if row.key in names]
