"""The stages of an attack run, and what they leave in pictures."""

from __future__ import annotations

from dataclasses import dataclass

from robustvlm.attacks import Goal, Result, ThreatModel
from robustvlm.attacks.plan import Attack
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.pictures import save_pair, save_to_gallery
from robustvlm.runs.results import CleanFact


@dataclass(frozen=True)
class Stage:
    """One attack at one eps for one goal."""

    attack: Attack
    threat: ThreatModel
    eps_text: str
    goal: Goal

    @property
    def title(self) -> str:
        about = "" if self.goal.spec == "misclassify" else f" {self.goal.spec}"
        return f"{self.attack.name} {self.threat.norm} {self.eps_text}{about}"


def save_pictures(folder: RunFolder, result: Result, fact: CleanFact, stage: Stage, *, every: bool) -> None:
    """Keep a success for the gallery, and among all adversarial images if `every` one is wanted."""
    about = picture_facts(result, fact, stage)
    pictures = (result.job.index, result.job.pixels, result.adversarial, about)
    save_to_gallery(folder.gallery_path, *pictures)
    if every:
        save_pair(folder.adversarial_path, *pictures)


def picture_facts(result: Result, fact: CleanFact, stage: Stage) -> dict[str, str]:
    """Return the metadata that goes with a saved pair of images."""
    shown = {
        "image_id": fact.image_id,
        "index": fact.index,
        "label": fact.label,
        "clean_prediction": fact.prediction,
        "prediction": result.prediction,
        "clean_confidence": fact.confidence,
        "confidence": result.confidence,
        "attack": stage.attack.name,
        "eps": stage.threat.eps,
    }
    return {key: str(value) for key, value in shown.items()}
