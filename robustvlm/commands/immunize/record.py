"""The record of an immunize run, as plain JSON, and what immunisation changed on the same images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.commands.immunize.config import ImmunizeConfig
from robustvlm.commands.immunize.images import Made
from robustvlm.data.names import some_of
from robustvlm.data.splits import copies
from robustvlm.defenses.immunity.antibodies import margins
from robustvlm.defenses.immunity.prototypes import Prototypes, angle
from robustvlm.defenses.immunity.recipe import Immunised
from robustvlm.defenses.immunity.state import Immunity, class_scores, open_set_score
from robustvlm.defenses.immunity.vaccine import pushed_share
from robustvlm.defenses.prompts import Features
from robustvlm.detect import auroc_interval
from robustvlm.errors import UserError
from robustvlm.stats import mcnemar_exact, rate

# The record of an immunize run, as plain JSON: every class, every antibody, every fit

Record = dict[str, Any]
INACTIVE = 1e-4
"""Share of pairs of image and antibody below which a margin is said to push nothing."""


def class_rows(immunity: Immunity, prototypes: Prototypes, made: Made, done: Immunised | None) -> list[Record]:
    """Return one row a class: prototype, threshold with its fit, margin to the nearest antibody."""
    nearest = margins(made.antibodies, prototypes.vectors)
    rows = []
    for k, name in enumerate(immunity.class_names):
        row: Record = {
            "name": name,
            "images": int(prototypes.counts[k]),
            "alpha": [round(float(value), 6) for value in prototypes.alpha[k]],
            "kappa": float(prototypes.kappa[k]),
            "threshold": float(immunity.thresholds[k]),
            "antibodies": len(made.antibodies.of(name)),
            "margin": float(nearest[k]),
            "held_out_right": 0,
            "pooled": False,
            "fit": None,
        }
        if done is not None:
            own = done.thresholds.classes[k]
            row |= {"held_out_right": own.images, "pooled": own.pooled, "fit": asdict(own.fit) if own.fit else None}
        rows.append(row)
    return rows


def antibody_facts(made: Made, config: ImmunizeConfig) -> Record:
    """Return the antibodies kept and dropped, and the band."""
    return {
        "source": config.antibodies,
        "band": None if made.band is None else {"safe": made.band.safe, "risk": made.band.risk},
        "kept": [[text.text, text.of_class, text.kind] for text in made.antibodies.texts],
        "dropped": [[gone.antibody.text, gone.antibody.of_class, gone.reason] for gone in made.dropped],
        "naming_unknown": dict(made.naming),
    }


def vaccine_facts(done: Immunised, margin: float, antibodies: torch.Tensor, fit: Features) -> Record:
    """Return the way of the vaccine: losses, the step that was kept, how far features were moved."""
    adapter = done.immunity.adapter
    with torch.no_grad():
        adapted = adapter(fit.features)
    moved = angle(adapted.double(), fit.features.double()).median()
    history = [asdict(look) for look in done.vaccinated.history]
    for look in history:
        look["train"] = None if math.isnan(look["train"]) else look["train"]
    return {
        "history": history,
        "chosen_step": done.vaccinated.chosen,
        "margin": margin,
        "pushed_share": pushed_share(fit.features, antibodies, margin),
        "median_move_degrees": math.degrees(float(moved)),
    }


def alignment_error(immunity: Immunity, held: Features) -> float | None:
    """Return eps_align: the mean angle, in degrees, between prototypes and the mean adapted held-out image of a class.

    Our reading of the theory's alignment error; classes without held-out images do not count, of several prototypes
    the nearest does.
    """
    angles = []
    with torch.no_grad():
        adapted = immunity.adapter(held.features)
    for k in range(len(immunity.class_names)):
        own = adapted[held.labels == k]
        if len(own):
            centre = F.normalize(own.mean(dim=0), dim=0).double()
            angles.append(float(angle(immunity.prototypes[k].double(), centre[None]).min()))
    return math.degrees(sum(angles) / len(angles)) if angles else None


def _of_unknown(record: Record, config: ImmunizeConfig) -> list[str]:
    """Return what has to be known of the unknown images: oracles, known classes and known images among them."""
    found = []
    naming, kept = record["antibodies"].get("naming_unknown", {}), {row[0] for row in record["antibodies"]["kept"]}
    if naming and config.oracle_words:
        told = [text for text in naming if text in kept]
        found.append(
            f"Oracle: {len(told)} antibodies name classes of the unknown sets ({some_of(told)}) and were kept "
            "(--oracle-words): what the model rejects there is no measure of what it would reject."
        )
    elif naming:
        found.append(
            f"{len(naming)} antibodies that name classes of the unknown sets were left out ({some_of(naming)}): the "
            "model would have been told what it is tested on. Without --ood they are kept."
        )
    for spec, measured in record["measures"].get("unknown", {}).items():
        if measured["known_classes"]:
            classes = some_of(f"{name} ({count})" for name, count in measured["known_classes"].items())
            found.append(f"Images of known classes were left out of the unknown set '{spec}': {classes}.")
        if measured["copies"]:
            found.append(
                f"{measured['copies']} images of the unknown set '{spec}' look to the model like known images: nothing "
                "can tell an image from itself."
            )
    copies = record.get("copies", 0)
    if copies:
        found.append(
            f"{copies} held-out images look to the model like images that taught it: thresholds and figures on them "
            "are too good."
        )
    for name, count in record.get("unreadable", {}).items():
        found.append(f"{count} images of '{name}' could not be read and are in no figure.")
    return found


def notes_of(record: Record, config: ImmunizeConfig) -> list[str]:
    """Return what a reader has to know before trusting the model, one sentence each."""
    found = []
    if not config.images:
        found.append(
            "Made without images: the share of known images that are rejected is not controlled, features are not "
            "adapted, and an image far from all texts is rejected only if an antibody happens to be nearest."
        )
        return found
    found += _of_unknown(record, config)
    rows = record["classes"]
    pooled = sum(bool(row.get("pooled")) for row in rows)
    if pooled:
        found.append(
            f"{pooled} of {len(rows)} classes have fewer than {config.min_images} held-out images that are classified "
            "right: they share one pooled threshold."
        )
    empty = sum(row["images"] == 0 for row in rows)
    if empty:
        found.append(f"{empty} of {len(rows)} classes have no images to learn from: their prototype is the text.")
    vaccine = record["vaccine"]
    if config.antibodies != "none" and vaccine["pushed_share"] < INACTIVE:
        found.append(
            f"The margin {vaccine['margin']:.3f} lies above nearly all cosines of images and antibodies and pushes "
            "nothing: --margin auto takes one from the data."
        )
    if vaccine["chosen_step"] == 0 and config.steps:
        found.append(
            "No step of the vaccine lowered the held-out loss at no cost in accuracy: features stay as they are."
        )
    if config.antibodies != "none" and not record["antibodies"]["kept"]:
        found.append("No antibody passed the filters: the score is the nearness to the best prototype alone.")
    return found


# What immunisation changed: accuracy, rejections and detection, before and after, on the same images


def judged(immunity: Immunity, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted classes [N] and acceptance scores S_DIS - tau [N] of unit features [N, D] of the base model."""
    with torch.no_grad():
        adapted = immunity.adapter(features)
    cosines = class_scores(adapted, immunity.prototypes)
    predicted = cosines.argmax(dim=1)
    score = open_set_score(adapted, immunity.prototypes, immunity.antibodies.embeddings, immunity.weight)
    return predicted, score - immunity.thresholds[predicted]


def measure(
    immunity: Immunity, text: Tensor, logit_scale: float, held: Features | None, unknown: Mapping[str, Features]
) -> dict[str, Any]:
    """Return the numbers of a run's record; unknown images that are of a known class (a label from 0) do not count.

    Before: the zero-shot head on class texts, with the largest softmax probability (MCM) as its detection score. After:
    classes by the nearest prototype; a right answer "accepted" is one that is not rejected either.
    """
    if held is None:
        return {}
    known = held.labels >= 0
    features, labels = held.features[known], held.labels[known]
    logits = logit_scale * features @ text.T
    predicted, acceptance = judged(immunity, features)
    before, after = (logits.argmax(dim=1) == labels).tolist(), (predicted == labels).tolist()
    accepted = acceptance > 0
    count = len(before)
    found: dict[str, Any] = {
        "accuracy_before": rate(sum(before), count).model_dump(),
        "accuracy_after": rate(sum(after), count).model_dump(),
        "paired": mcnemar_exact(before, after).model_dump(),
        "accepted_right": rate(int((accepted & (predicted == labels)).sum()), count).model_dump(),
        "rejected": rate(int((~accepted).sum()), count).model_dump(),
        "rejected_right": rate(
            int((~accepted & (predicted == labels)).sum()), int((predicted == labels).sum())
        ).model_dump(),
        "unknown": {},
    }
    groups = [group for group, wanted in zip(held.groups, known.tolist(), strict=True) if wanted]
    confidence = logits.softmax(dim=1).amax(dim=1)
    for spec, whole in unknown.items():
        other = whole.rows((whole.labels < 0).nonzero().flatten())
        if not other.ids:
            raise UserError(f"every image of '{spec}' is of a known class: pass others to --ood")
        rival = (logit_scale * other.features @ text.T).softmax(dim=1).amax(dim=1)
        _, theirs = judged(immunity, other.features)
        interval = partial(auroc_interval, known_groups=groups, unknown_groups=other.groups)
        found["unknown"][spec] = {
            "images": len(other.ids),
            "auroc_mcm": asdict(interval(confidence.double().numpy(), rival.double().numpy())),
            "auroc": asdict(interval(acceptance.double().numpy(), theirs.double().numpy())),
            "accepted": rate(int((theirs > 0).sum()), len(theirs)).model_dump(),
            "rejected": rate(int((theirs <= 0).sum()), len(theirs)).model_dump(),
            "known_classes": {
                immunity.class_names[label]: count
                for label, count in sorted(Counter(whole.labels.tolist()).items())
                if label >= 0
            },
            "copies": copies(other.features, held.features),
        }
    return found
