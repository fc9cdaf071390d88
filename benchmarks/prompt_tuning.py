"""Prompt tuning with and without the energy terms, beside hand-written prompts: under a new style, and open-set.

    python -m benchmarks.prompt_tuning [--choose] [--lapt] [--seeds 5] [--train TRAIN.parquet --test TEST.parquet]

Three settings on `tiny`:
  styles      16 images a class of the six styles that `tiny` was trained on; tested on Twemoji, a style it never saw
  new style   all images of Streamline, which `tiny` never saw; tested on Twemoji
  CIFAR-10    16 images of each of 6 classes drawn by the seed; the other 4 are unknown (needs the two Parquet files)
`--choose` prints the table that the weight of the energy term was chosen by: the first setting, tested on Streamline.
`--lapt` prints the first two with LAPT in place of EBM, by the share of the classes among classes and negative words.
Images are encoded once and kept under --cache. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import exit_code_of
from robustvlm.core.seeds import generator
from robustvlm.data import open_data
from robustvlm.data.names import same_things
from robustvlm.defenses.lapt import NegativePrompts, farthest_words, mixing
from robustvlm.defenses.prompts import Features, PromptLearner, Terms, TuneSettings, choose_shots, encode_source, tune
from robustvlm.detect import (
    Head,
    MaxLogit,
    Supplies,
    auroc,
    energy_change,
    find_score,
    outside,
    tree_words,
)
from robustvlm.detect.logits import MCM
from robustvlm.detect.metrics import fpr_at_tpr
from robustvlm.models import VLM, load_model
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.stats import mean

N_RESET = 2
METHODS: dict[str, float | None] = {"CoOp": None, "CE + masked CE": 0.0, "EBM": 10.0}


@dataclass(frozen=True)
class Setting:
    """What prompts are tuned on and what they are tested on."""

    class_names: Sequence[str]
    templates: Sequence[str]
    shots: Features
    known: Features
    unknown: dict[str, Features]


class Kept:
    """Features of data specs, encoded once by one model."""

    def __init__(self, vlm: VLM, cache: Path) -> None:
        self.vlm, self.cache = vlm, cache

    def features(self, spec: str, limit: int | None = None) -> Features:
        source = open_data(spec)
        path = self.cache / f"{self.vlm.fingerprint[:12]}-{source.fingerprint()[:12]}-{limit or 'all'}.safetensors"
        if not path.exists():
            found = encode_source(self.vlm, source, limit=limit)
            self.cache.mkdir(parents=True, exist_ok=True)
            save_file({"features": found.features, "labels": found.labels}, path, {"ids": "\n".join(found.ids)})
        stored = load_file(path)
        ids = _ids(path)
        return Features(stored["features"], stored["labels"], ids, tuple(source.group(name) for name in ids))


def _ids(path: Path) -> tuple[str, ...]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return tuple(file.metadata()["ids"].split("\n"))


def pick(features: Features, keep: Iterable[str] | Tensor) -> Features:
    """Return the rows whose id is among `keep`, or that a mask selects."""
    mask = keep if isinstance(keep, Tensor) else torch.tensor([name in set(keep) for name in features.ids])
    rows = mask.nonzero().flatten().tolist()
    ids, groups = (tuple(part[row] for row in rows) for part in (features.ids, features.groups))
    return Features(features.features[rows], features.labels[rows], ids, groups)


def emoji(kept: Kept, seed: int, *, tuned_on: str, tested_on: str) -> Setting:
    source = open_data(tuned_on)
    shots = frozenset(choose_shots(source, 16, seed))
    style = open_data(tested_on).spec.split("styles=")[1].split("&")[0]
    unknown = {name: kept.features(f"emoji?split={name}&styles={style}") for name in ("near", "far")}
    tuning = pick(kept.features(tuned_on), torch.tensor([name in shots for name in kept.features(tuned_on).ids]))
    return Setting(source.class_names, source.templates, tuning, kept.features(tested_on), unknown)


def cifar(kept: Kept, seed: int, *, train: str, test: str) -> Setting:
    source = open_data(train)
    order = torch.randperm(len(source.class_names), generator=generator(seed, "known classes")).tolist()
    known = sorted(order[:6])
    tuning, testing = kept.features(train, 1600), kept.features(test, 3000)
    shots, seen = [], dict.fromkeys(known, 0)
    for row in torch.randperm(len(tuning.ids), generator=generator(seed, "shots")).tolist():
        label = int(tuning.labels[row])
        if seen.get(label, 16) < 16:
            seen[label] += 1
            shots.append(row)
    mask = torch.zeros(len(tuning.ids), dtype=torch.bool)
    mask[shots] = True
    inside = torch.isin(testing.labels, torch.tensor(known))
    relabel = {label: i for i, label in enumerate(known)}
    return Setting(
        [source.class_names[label] for label in known],
        source.templates,
        _relabelled(pick(tuning, mask), relabel),
        _relabelled(pick(testing, inside), relabel),
        {"other classes": pick(testing, ~inside)},
    )


def _relabelled(features: Features, names: dict[int, int]) -> Features:
    labels = torch.tensor([names[int(label)] for label in features.labels])
    return Features(features.features, labels, features.ids, features.groups)


def embeddings(vlm: VLM, setting: Setting, weight: float | None, seed: int, epochs: int) -> Tensor:
    learner = PromptLearner(vlm, setting.class_names, length=4, start="a picture of a", seed=seed)
    settings = TuneSettings(epochs=epochs, weight=weight, seed=seed)
    tune(learner, setting.shots.features, setting.shots.labels, scale=vlm.logit_scale, settings=settings)
    with torch.no_grad():
        return learner()


def lapt_rows(vlm: VLM, setting: Setting, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Return the measures of LAPT, and of what it is beside: NegLabel with hand-written prompts, and CoOp's."""
    every = outside(tree_words(), setting.class_names, open_data("emoji").tree)
    shown = [thing for name in ("near", "far") for thing in open_data(f"emoji?split={name}").things()]
    naming = same_things(every, shown)
    plain = class_embeddings(vlm, setting.class_names, setting.templates)
    found = farthest_words(vlm, [word for word in every if word not in naming], setting.templates, plain)
    fixed = torch.cat([plain, found.embeddings])
    rows = {"hand-written": fixed}
    rows["CoOp, words hand-written"] = torch.cat([embeddings(vlm, setting, None, seed, epochs), found.embeddings])
    few = {"length": 4, "start": "a picture of a", "seed": seed}
    for name, part in (("LAPT, no cross-distribution mixing", "cross_modal"), ("LAPT", "loss")):
        known, others = (PromptLearner(vlm, names, **few) for names in (setting.class_names, found.words))  # type: ignore[arg-type]
        learner = NegativePrompts(known, others)
        terms = mixing(learner, fixed, scale=vlm.logit_scale, seed=seed)

        def lowered(
            features: Tensor, labels: Tensor, step: int, terms: Terms = terms, part: str = part
        ) -> dict[str, Tensor]:
            return {"loss": terms(features, labels, step)[part]}

        settings = TuneSettings(epochs=epochs, weight=None, seed=seed)
        shots = setting.shots
        tune(learner, shots.features, shots.labels, scale=vlm.logit_scale, settings=settings, terms_of=lowered)
        with torch.no_grad():
            rows[name] = learner()
    return {name: open_set(vlm, setting, texts, len(plain)) for name, texts in rows.items()}


def open_set(vlm: VLM, setting: Setting, texts: Tensor, classes: int) -> dict[str, float]:
    """Return accuracy, and AUROC and FPR95 of the share of the classes and of the largest logit."""
    head = Head(texts[:classes], vlm.logit_scale)
    right = head.logits(setting.known.features).argmax(dim=1) == setting.known.labels
    found = {"accuracy": right.float().mean().item()}
    share = find_score("lapt").made(Supplies(head, negatives=texts[classes:]))
    for name, other in setting.unknown.items():
        for title, score in (("share", share), ("largest logit", MaxLogit(head))):
            mine, theirs = (score.predict(part.features).double().numpy() for part in (setting.known, other))
            found[f"AUROC {name}, {title}"] = auroc(mine, theirs)
            found[f"FPR95 {name}, {title}"] = fpr_at_tpr(mine, theirs)
    return found


def run_lapt(title: str, vlm: VLM, settings: list[Setting], epochs: int) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed, setting in enumerate(settings):
        for name, found in lapt_rows(vlm, setting, seed, epochs).items():
            rows.setdefault(name, []).append(found)
    table(title, rows, "hand-written")


def measures(vlm: VLM, setting: Setting, texts: Tensor) -> dict[str, float]:
    def delta(features: Tensor) -> Tensor:
        return energy_change(vlm.logit_scale * features @ texts.T, N_RESET).double()

    mcm = MCM(Head(texts, vlm.logit_scale))
    right = (setting.known.features @ texts.T).argmax(dim=1) == setting.known.labels
    found = {"accuracy": right.float().mean().item()}
    for name, other in setting.unknown.items():
        mine, theirs = delta(setting.known.features).numpy(), delta(other.features).numpy()
        found[f"AUROC {name}, energy change"] = auroc(mine, theirs)
        found[f"FPR95 {name}, energy change"] = fpr_at_tpr(mine, theirs)
        found[f"AUROC {name}, MCM"] = auroc(
            mcm.score(setting.known.features).double().numpy(), mcm.score(other.features).double().numpy()
        )
    return found


def table(title: str, rows: dict[str, list[dict[str, float]]], baseline: str) -> None:
    """Print means over seeds with standard deviations, and the paired difference of the last row to a baseline."""
    columns = list(next(iter(rows.values()))[0])
    print(f"\n### {title}\n\n| prompts | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, runs in rows.items():
        cells = [_cell([run[column] for run in runs]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    last = list(rows)[-1]
    if len(rows[last]) > 1 and baseline in rows:
        cells = []
        for column in columns:
            found = mean([100 * (a[column] - b[column]) for a, b in zip(rows[last], rows[baseline], strict=True)])
            cells.append(f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})")
        print(f"| {last} - {baseline}, 95 % | {' | '.join(cells)} |", flush=True)


def _cell(values: list[float]) -> str:
    spread = torch.tensor(values).std().item() if len(values) > 1 else 0.0
    average = sum(values) / len(values)
    return f"{100 * average:.1f}" + (f" ± {100 * spread:.1f}" if spread else "")


def run(title: str, vlm: VLM, settings: list[Setting], methods: dict[str, float | None], epochs: int) -> None:
    rows: dict[str, list[dict[str, float]]] = {
        "hand-written": [
            measures(vlm, setting, class_embeddings(vlm, setting.class_names, setting.templates))
            for setting in settings
        ]
    }
    for name, weight in methods.items():
        rows[name] = [
            measures(vlm, setting, embeddings(vlm, setting, weight, seed, epochs))
            for seed, setting in enumerate(settings)
        ]
    table(title, rows, "CoOp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/prompt-features"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--choose", action="store_true", help="the table on the validation style instead")
    parser.add_argument("--lapt", action="store_true", help="LAPT beside CoOp and NegLabel instead")
    parser.add_argument("--train", type=Path, help="CIFAR-10 training images (Parquet)")
    parser.add_argument("--test", type=Path, help="CIFAR-10 test images (Parquet)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    vlm = load_model("tiny")
    kept, seeds = Kept(vlm, options.cache), range(options.seeds)
    styles = "emoji?split=train&copies=3"
    if options.choose:
        settings = [emoji(kept, seed, tuned_on=styles, tested_on="emoji?split=val&copies=4") for seed in seeds]
        weights: dict[str, float | None] = {"CoOp": None} | {
            f"EBM, weight {w:g}": w for w in (0.0, 0.3, 1.0, 3.0, 10.0)
        }
        run("Validation style (Streamline)", vlm, settings, weights, options.epochs)
        return
    test = "emoji?split=test&copies=4"
    if options.lapt:
        for title, tuned_on in (("the training styles", styles), ("Streamline", "emoji?split=val&copies=4")):
            settings = [emoji(kept, seed, tuned_on=tuned_on, tested_on=test) for seed in seeds]
            run_lapt(f"Tuned on {title}, tested on Twemoji", vlm, settings, options.epochs)
        return
    settings = [emoji(kept, seed, tuned_on=styles, tested_on=test) for seed in seeds]
    run("Tuned on the training styles, tested on Twemoji", vlm, settings, METHODS, options.epochs)
    settings = [emoji(kept, seed, tuned_on="emoji?split=val&copies=4", tested_on=test) for seed in seeds]
    run("Tuned on Streamline, tested on Twemoji", vlm, settings, METHODS, options.epochs)
    if options.train and options.test:
        specs = {"train": f"parquet:{options.train}", "test": f"parquet:{options.test}"}
        settings = [cifar(kept, seed, **specs) for seed in seeds]
        run("CIFAR-10, 6 known classes", vlm, settings, METHODS, options.epochs)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
