"""Tables of AUROC and FPR95 for every score.

python -m benchmarks.detect emoji [--also MODEL ...]
python -m benchmarks.detect cifar10 --train TRAIN.parquet --test TEST.parquet [--also MODEL ...]

--also adds a row for a model that may refuse (its own acceptance score); {seed} in it stands for the seed, since each
split needs a model of its own known classes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.common import exit_code_of
from benchmarks.detect.sources import Kept
from benchmarks.detect.tables import Found, judge, judge_all, subset, table
from robustvlm.commands.detect.encoding import Encoded
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier
from robustvlm.detect import GDA, COOkeD, Head, Supplies
from robustvlm.detect.distances import choose_alpha
from robustvlm.errors import UserError
from robustvlm.models.zero_shot import class_embeddings

SEEN = "fxemoji"
OTHERS = "noto,noto-v1,fluent-emoji,fluent-emoji-flat,emojione"


def emoji(options: argparse.Namespace) -> None:
    """Known and unknown emoji of one style, unseen or seen in training; the seed chooses half of the fit set."""
    source = open_data("emoji")
    kept = Kept(options.cache, load_classifier(options.model, source.class_names, source.templates))
    head = Head(kept.classifier.class_embeddings, kept.classifier.logit_scale)  # type: ignore[arg-type]
    words = kept.words(source, [open_data(f"emoji?split={name}") for name in ("near", "far")])
    seen, fit_on_others = f"emoji?split=train&styles={SEEN}", f"emoji?split=train&styles={OTHERS}"
    cases = [
        ("unseen style (Twemoji)", "emoji", "twemoji", "emoji?split=train"),
        ("style seen in training (FxEmojis)", seen, SEEN, fit_on_others),
    ]
    for title, known_spec, style, fit_spec in cases:
        known, fit = kept.answers(known_spec), kept.answers(fit_spec)
        unknown = {name: f"emoji?split={name}&styles={style}" for name in ("near", "far")}
        features = {name: _features(kept.answers(spec)) for name, spec in unknown.items()}
        found: Found = {}
        for seed in range(options.seeds):
            rows = subset(len(fit.ids), 0.5, seed)
            supplies = Supplies(head, features=_features(fit)[rows], labels=fit.labels[rows], words=words)
            judge_all(found, supplies, _features(known), features)
        accuracy = float((head.logits(_features(known)).argmax(1) == known.labels).double().mean())
        print(f"\n{title}: {len(known.ids)} known images, zero-shot accuracy {accuracy:.3f}\n")
        for spec in options.also:
            own = Kept(options.cache, load_classifier(spec, source.class_names, source.templates))
            others = {name: own.own_scores(other) for name, other in unknown.items()}
            for kind, values in own.own_scores(known_spec).items():
                judge(found, f"`{spec}`, {kind}", values, {name: scores[kind] for name, scores in others.items()})
        print(table(found, list(unknown)))
        _classifiers(head, fit, known)


def cifar10(options: argparse.Namespace) -> None:
    """Six classes of CIFAR-10, chosen by the seed, are known; the other four are near, emoji are far."""
    source = open_data(f"parquet:{options.test}")
    kept = Kept(options.cache, load_classifier(options.model, source.class_names, source.templates))
    assert kept.classifier.vlm is not None
    vlm, words = kept.classifier.vlm, kept.words(source, [open_data("emoji")])
    texts = class_embeddings(vlm, source.class_names, source.templates)
    test, train = kept.answers(f"parquet:{options.test}"), kept.answers(f"parquet:{options.train}", options.fit_limit)
    far = _features(kept.answers("emoji"))
    found: Found = {}
    for seed in range(options.seeds):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        ids, held_out = order[:6].sort().values, order[6:].sort().values
        head = Head(texts[ids], vlm.logit_scale)
        known, rest = _among(test, ids), _among(test, held_out)
        fit = _among(train, ids)
        labels = torch.searchsorted(ids, train.labels[fit])
        supplies = Supplies(head, features=_features(train)[fit], labels=labels, words=words)
        unknown = {"held-out classes": _features(test)[rest], "emoji": far}
        judge_all(found, supplies, _features(test)[known], unknown)
        right = head.logits(_features(test)[known]).argmax(1) == torch.searchsorted(ids, test.labels[known])
        names = ", ".join(source.class_names[i] for i in ids)
        print(f"seed {seed}: known {names}; zero-shot accuracy {float(right.double().mean()):.3f}")
        for spec in options.also:
            classes = [source.class_names[i] for i in ids]
            own = Kept(options.cache, load_classifier(spec.replace("{seed}", str(seed)), classes, source.templates))
            on_emoji = own.own_scores("emoji")
            for kind, values in own.own_scores(f"parquet:{options.test}").items():
                others = {"held-out classes": values[rest], "emoji": on_emoji[kind]}
                judge(found, f"`{spec}`, {kind}", values[known], others)
    print()
    print(table(found, ["held-out classes", "emoji"]))


def _classifiers(head: Head, fit: Encoded, known: Encoded) -> None:
    """Print the accuracy of the scores that are classifiers too; GDA's weight is chosen on a fifth of the fit set."""
    rows = subset(len(fit.ids), 0.8, 0)
    apart = torch.ones(len(fit.ids), dtype=torch.bool).index_fill(0, rows, False)
    gda = GDA(head).fit_features(_features(fit)[rows], fit.labels[rows])
    gda = choose_alpha(gda, _features(fit)[apart], fit.labels[apart])
    cooked = COOkeD(head).fit_features(_features(fit), fit.labels)
    for name, logits in (
        (f"GDA classifier (alpha {gda.alpha:g})", gda.logits(_features(known))),
        ("COOkeD", cooked.log_probabilities(_features(known))),
    ):
        print(f"\naccuracy of the {name}: {float((logits.argmax(1) == known.labels).double().mean()):.3f}")


def _features(found: Encoded) -> torch.Tensor:
    if found.features is None:
        raise UserError("the benchmark needs a model with an encoder")
    return found.features


def _among(found: Encoded, labels: torch.Tensor) -> torch.Tensor:
    return torch.isin(found.labels, labels).nonzero().flatten()


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect", description="AUROC and FPR95 of every score.")
    parser.add_argument("benchmark", choices=("emoji", "cifar10"))
    parser.add_argument("--model", help="default: tiny, or benchmarks.cifar10.model:load")
    parser.add_argument("--also", action="append", default=[], metavar="MODEL", help="a model that may refuse")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=Path, help="CIFAR-10 training Parquet file")
    parser.add_argument("--test", type=Path, help="CIFAR-10 test Parquet file")
    parser.add_argument("--fit-limit", type=int, default=5000, help="training images to learn from (cifar10)")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark-detect"), help="folder of kept features")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure the benchmark that is named, on its model."""
    if options.benchmark == "cifar10":
        if options.train is None or options.test is None:
            raise UserError("the CIFAR-10 benchmark needs its files: pass --train and --test")
        options.model = options.model or "benchmarks.cifar10.model:load"
        cifar10(options)
    else:
        options.model = options.model or "tiny"
        emoji(options)


if __name__ == "__main__":
    sys.exit(main())
