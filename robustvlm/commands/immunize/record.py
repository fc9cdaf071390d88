"""The record of an immunize run, as plain JSON, and what immunisation changed on the same images."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from robustvlm.commands.immunize import ImmunizeSettings
from robustvlm.commands.immunize.images import Made
from robustvlm.core.files import write_text
from robustvlm.data.names import some_of
from robustvlm.data.splits import copies
from robustvlm.defenses.immunity.antibodies import margins
from robustvlm.defenses.immunity.prototypes import Prototypes, angle
from robustvlm.defenses.immunity.recipe import Decided, Deciding, Immunised
from robustvlm.defenses.immunity.state import Immunity, card_settings, class_scores, save_tensors
from robustvlm.defenses.immunity.thresholds import Thresholds
from robustvlm.defenses.immunity.vaccine import VaccineSettings, pushed_share
from robustvlm.defenses.prompts import Features
from robustvlm.detect import auroc_interval
from robustvlm.detect.base import confidence
from robustvlm.detect.metrics import Interval
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, write_card
from robustvlm.runs import records
from robustvlm.runs.run import FinishedRun, Session, read_finished
from robustvlm.stats import PairedTest, Rate, mcnemar_exact, rate, worth_of

NAME = "immunity.json"
Record = dict[str, Any]


class _Part(records.Record):
    """Part of the record, which holds what it was given and no more."""

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}


class Unknown(_Part):
    """What the model does with one set of unknown images; AUROC is against the held-out known images.

    Args:
        auroc_msp: of the largest softmax probability of the model as it was (called MCM before, which has another
            temperature, and rounded to ties then); auroc: of the score less its threshold.
        known_classes: images of known classes that were left out, by class; copies: images that look like known ones.
    """

    images: int
    auroc_msp: Interval = Field(validation_alias=AliasChoices("auroc_msp", "auroc_mcm"))
    auroc: Interval
    accepted: Rate
    rejected: Rate | None = None
    known_classes: dict[str, int] = Field(default_factory=dict)
    copies: int = 0

    @property
    def share_rejected(self) -> Rate:
        """The share rejected, also of a record of the time when the accepted alone were kept."""
        accepted = self.accepted
        if self.rejected is not None:
            return self.rejected
        share = None if accepted.value is None else 1 - accepted.value
        missed, total = accepted.total - accepted.successes, accepted.total
        return Rate(successes=missed, total=total, value=share, low=1 - accepted.high, high=1 - accepted.low)


class Measures(_Part):
    """What was measured on the held-out images before and after, and on each unknown set; nothing without images.

    Args:
        paired: answers before and after, cross-counted; accepted_right: right and not rejected.
        rejected: known images that are refused; rejected_right: among those classified right.
    """

    accuracy_before: Rate | None = None
    accuracy_after: Rate | None = None
    paired: PairedTest | None = None
    accepted_right: Rate | None = None
    rejected: Rate | None = None
    rejected_right: Rate | None = None
    unknown: dict[str, Unknown] = Field(default_factory=dict)


class Others(_Part):
    """Answers to the held-out images of the other classes before and after a class was added, as in `PairedTest`."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    things: int | None = None
    total: int


class Added(_Part):
    """A class that was added to the run `to`: what it costs the others, and how well it is known itself."""

    name: str
    to: str
    others: Others
    others_accepted: PairedTest
    accuracy: Rate
    accepted: Rate


class ImmunizeSummary(_Part):
    """What `immunity.json` holds. What a way of making the model has nothing to say of is left out of it.

    Args:
        templates: prompts of the class texts; classes: a row for each, see `class_rows`.
        xi_degrees: largest angle from a prototype to its text; weight: of the antibodies in the score; floor, gains: of
            a hinge, from where they count and what each weight gained on classes left out.
        antibodies, diagnostics, vaccine, pooled_fit: see `antibody_facts`, `diagnose`, `vaccine_facts`.
        copies: held-out images that look like images that taught; unreadable: how many, by data.
        images: how many taught and were held out; noisy_thresholds: least, median and largest, by noise level.
        noisy_own: by noise level, how many images set thresholds, and how many classes have one of their own, for
            means and for single copies.
        measures: see `measure`; added: what a class that was added did to the others.
        notes: what a reader has to know before trusting the model.
    """

    format: int = 1
    templates: list[str] | None = None
    classes: list[dict[str, Any]]
    xi_degrees: float
    antibodies: dict[str, Any]
    diagnostics: dict[str, Any]
    weight: float
    floor: float | None = None
    gains: dict[str, tuple[float, float]] | None = None
    copies: int = 0
    unreadable: dict[str, int] | None = None
    images: dict[str, int] | None = None
    vaccine: dict[str, Any] | None = None
    pooled_fit: dict[str, Any] | None = None
    noisy_thresholds: dict[str, list[float]] | None = None
    noisy_own: dict[str, dict[str, int]] | None = None
    measures: Measures
    added: Added | None = None
    notes: list[str]
    seconds: float | None = None


def read_run(folder: Path) -> FinishedRun[ImmunizeSummary]:
    """Read a finished immunize run; UserError when it has not ended, or a file is damaged or of another version."""
    run = read_finished(folder, NAME, ImmunizeSummary, kind="immunize")
    try:
        ImmunizeSettings.of(run.manifest["config"])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{folder / 'manifest.json'}': its config is not of this version ({error}); run it again"
        ) from None
    return run


def save_model(session: Session, immunity: Immunity, record: Record, base: str, vlm: VLM) -> None:
    """Write tensors and record, then the card, without which the folder is no model."""
    summary = ImmunizeSummary(**record)
    with session.results() as folder:
        save_tensors(folder, immunity)
        write_text(folder / NAME, json.dumps(summary.model_dump(), indent=1, ensure_ascii=False) + "\n")
        write_card(folder, Card("immunize", base, vlm.fingerprint, card_settings(immunity), probe_encoder(vlm)))


def vaccine_settings(settings: ImmunizeSettings, margin: float) -> VaccineSettings:
    """Return the settings of the vaccine; the margin is that of the settings, or taken from the data."""
    shared = ("hidden", "steps", "lr", "push_weight", "push_nearest", "mix_weight", "decay", "seed")
    return VaccineSettings(margin=margin, **{name: getattr(settings, name) for name in shared})


def deciding(settings: ImmunizeSettings, hinge: tuple[float, float] | None = None) -> Deciding:
    """Return how held-out images set score and thresholds; `hinge` are weight and floor that are known already."""
    return Deciding(
        settings.lambda_inf if settings.rule == "s-dis" else None,
        hinge,
        settings.miss,
        settings.min_images,
        settings.thresholds,
        settings.tail,
        settings.seed,
    )


# Its parts: every class, every antibody, every fit

INACTIVE = 1e-4
"""Share of pairs of image and antibody below which a margin is said to push nothing."""


def class_rows(
    immunity: Immunity, prototypes: Prototypes, made: Made, done: Immunised | Decided | None
) -> list[Record]:
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
            row |= {"by_density": True} if own.by_density else {}
        rows.append(row)
    return rows


def score_facts(immunity: Immunity, done: Immunised | Decided | None) -> Record:
    """Return how antibodies count in the score, and of a hinge what its weight was chosen by."""
    if immunity.floor is None:
        return {"weight": immunity.weight}
    choice = None if done is None else done.choice
    gains: Record = {} if choice is None else {f"{weight:g}": gain for weight, gain in choice.gains.items()}
    return {"weight": immunity.weight, "floor": immunity.floor, "gains": gains}


def own_thresholds(thresholds: Thresholds) -> int:
    """Return how many classes have a threshold that their own images set; the others share the pooled one."""
    return sum(not found.pooled for found in thresholds.classes)


def pooled_fit(thresholds: Thresholds) -> Record:
    """Return the fit of all classes together, with its threshold."""
    return {**asdict(thresholds.pooled), "threshold": thresholds.pooled.threshold(thresholds.miss)}


def antibody_facts(made: Made, settings: ImmunizeSettings) -> Record:
    """Return the antibodies kept and dropped, and the band."""
    return {
        "source": settings.antibodies,
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


def _of_unknown(record: Record, settings: ImmunizeSettings) -> list[str]:
    """Return what has to be known of the unknown images: oracles, known classes and known images among them."""
    found = []
    naming, kept = record["antibodies"].get("naming_unknown", {}), {row[0] for row in record["antibodies"]["kept"]}
    if naming and settings.oracle_words:
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
    for spec, measured in record["measures"].unknown.items():
        if measured.known_classes:
            classes = some_of(f"{name} ({count})" for name, count in measured.known_classes.items())
            found.append(f"Images of known classes were left out of the unknown set '{spec}': {classes}.")
        if measured.copies:
            found.append(
                f"{measured.copies} images of the unknown set '{spec}' look to the model like known images: nothing "
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


def notes_of(record: Record, settings: ImmunizeSettings) -> list[str]:
    """Return what a reader has to know before trusting the model, one sentence each."""
    found = []
    if settings.no_images and settings.calibrate is None:
        found.append(
            "Made without images: the share of known images that are rejected is not controlled, features are not "
            "adapted, and an image far from all texts is rejected only if an antibody happens to be nearest."
        )
        return found
    found += _of_unknown(record, settings)
    if record.get("gains") and record["weight"] == 0.0:
        found.append(
            "The antibodies count for nothing in the score, which is the nearness to the best prototype alone: on "
            "known classes left out in turn no weight gained more than chance explains (--rule s-dis makes them count)."
        )
    rows = record["classes"]
    pooled = sum(bool(row.get("pooled")) for row in rows)
    if pooled:
        found.append(
            f"{pooled} of {len(rows)} classes have fewer than {settings.min_images} held-out images that are "
            "classified right: they share one pooled threshold."
        )
    for sigma, own in record.get("noisy_own", {}).items():
        shared = len(rows) - own["means"]
        if shared > pooled:
            found.append(
                f"At noise {sigma} {shared} of {len(rows)} classes share one pooled threshold: of the "
                f"{own['images']} held-out images that set it, fewer than {settings.min_images} of theirs are right."
            )
    if settings.no_images:
        return found
    empty = sum(row["images"] == 0 for row in rows)
    if empty:
        found.append(f"{empty} of {len(rows)} classes have no images to learn from: their prototype is the text.")
    vaccine = record["vaccine"]
    if settings.antibodies != "none" and vaccine["pushed_share"] < INACTIVE:
        found.append(
            f"The margin {vaccine['margin']:.3f} lies above nearly all cosines of images and antibodies and pushes "
            "nothing: --margin auto takes one from the data."
        )
    if vaccine["chosen_step"] == 0 and settings.steps:
        found.append(
            "No step of the vaccine lowered the held-out loss at no cost in accuracy: features stay as they are."
        )
    if settings.antibodies != "none" and not record["antibodies"]["kept"]:
        found.append("No antibody passed the filters: the score is the nearness to the best prototype alone.")
    return found


# What immunisation changed: accuracy, rejections and detection, before and after, on the same images


def judged(immunity: Immunity, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted classes [N] and acceptance scores S_DIS - tau [N] of unit features [N, D] of the base model."""
    with torch.no_grad():
        adapted = immunity.adapter(features)
    cosines = class_scores(adapted, immunity.prototypes)
    predicted = cosines.argmax(dim=1)
    return predicted, immunity.score(adapted) - immunity.thresholds[predicted]


def measure(
    immunity: Immunity, text: Tensor, logit_scale: float, held: Features | None, unknown: Mapping[str, Features]
) -> Measures:
    """Return the numbers of a run's record; unknown images that are of a known class (a label from 0) do not count.

    Before: the zero-shot head on class texts, with the largest softmax probability (MSP) as its detection score. After:
    classes by the nearest prototype; a right answer "accepted" is one that is not rejected either.
    """
    if held is None:
        return Measures()
    known = held.labels >= 0
    features, labels = held.features[known], held.labels[known]
    logits = logit_scale * features @ text.T
    predicted, acceptance = judged(immunity, features)
    before, after = (logits.argmax(dim=1) == labels).tolist(), (predicted == labels).tolist()
    accepted = acceptance > 0
    count = len(before)
    groups = [group for group, wanted in zip(held.groups, known.tolist(), strict=True) if wanted]
    worth = worth_of(groups)
    before_score, sets = confidence(logits), {}
    for spec, whole in unknown.items():
        other = whole.rows((whole.labels < 0).nonzero().flatten())
        if not other.ids:
            raise UserError(f"every image of '{spec}' is of a known class: pass others to {setting('ood')}")
        rival = confidence(logit_scale * other.features @ text.T)
        _, theirs = judged(immunity, other.features)
        interval = partial(auroc_interval, known_groups=groups, unknown_groups=other.groups)
        sets[spec] = Unknown(
            images=len(other.ids),
            auroc_msp=interval(before_score.double().numpy(), rival.double().numpy()),
            auroc=interval(acceptance.double().numpy(), theirs.double().numpy()),
            accepted=rate(int((theirs > 0).sum()), len(theirs), independent=worth_of(other.groups)),
            rejected=rate(int((theirs <= 0).sum()), len(theirs), independent=worth_of(other.groups)),
            known_classes={
                immunity.class_names[label]: count
                for label, count in sorted(Counter(whole.labels.tolist()).items())
                if label >= 0
            },
            copies=copies(other.features, held.features),
        )
    right = predicted == labels
    of_right = [group for group, said in zip(groups, right.tolist(), strict=True) if said]
    return Measures(
        accuracy_before=rate(sum(before), count, independent=worth),
        accuracy_after=rate(sum(after), count, independent=worth),
        paired=mcnemar_exact(before, after, groups=groups),
        accepted_right=rate(int((accepted & right).sum()), count, independent=worth),
        rejected=rate(int((~accepted).sum()), count, independent=worth),
        rejected_right=rate(int((~accepted & right).sum()), int(right.sum()), independent=worth_of(of_right)),
        unknown=sets,
    )
