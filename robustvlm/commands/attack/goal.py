"""What a run is to reach, and where its images stand before any attack: the goals, and the clean pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Goal, Known, Targeted, read_goals, split_goal
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.data import DataSource
from robustvlm.data.decode import decode, image_suffixes
from robustvlm.data.source import UNKNOWN, Unreadable
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import BadSetting, UserError
from robustvlm.models import VLM
from robustvlm.runs.records import Check


@dataclass(frozen=True)
class Aim:
    """What a run attacks for.

    Args:
        spec: as on the command line.
        goals: the goals, each attacked in turn; one, but for `superclass:matrix`.
        model: what is attacked: pixels to the goals' outputs.
        notes: what the reader of the results has to know of the model.
    """

    spec: str
    goals: tuple[Goal, ...]
    model: nn.Module
    notes: tuple[Check, ...] = ()

    @property
    def leave(self) -> bool:
        """Whether an image leaves at its first success; otherwise every attack goes on to the end of its budget."""
        return len(self.goals) == 1 and self.goals[0].leave

    @property
    def unknown(self) -> bool:
        """Whether images of unknown classes are attacked, instead of those of known ones."""
        return self.goals[0].unknown

    @property
    def target(self) -> int | None:
        """The class that images are to be taken for; those that belong to it are left out."""
        return self.goals[0].target if isinstance(self.goals[0], Targeted) else None

    @property
    def everyone(self) -> bool:
        """Whether images are attacked also where the goal is reached unperturbed: scored at levels where it is not."""
        return len(self.goals) > 1

    def wants(self, label: int) -> bool:
        """Whether images of this class are attacked."""
        return label != self.target and (label == UNKNOWN) == self.unknown

    def why_not(self) -> str:
        """Say which images are left out, and what to do about it."""
        if self.unknown:
            return "of known classes: the goal intrude needs images of unknown classes"
        if self.target is not None:
            return "of the target class or of none: targeted attacks need labelled images of other classes"
        return "of none of the classes: attacks need labelled images (only --goal intrude takes unknown ones)"


class Features(nn.Module):
    """The image encoder of a classifier: pixels [B, 3, H, H] to unit features [B, D]."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return self.vlm.encode_image(pixels)


def check_goal(text: str, min_cos: float = 0.5) -> None:
    """Refuse a goal that no model or data could make right."""
    split_goal(text)
    if not -1 < min_cos < 1:
        raise BadSetting("min_cos", "must lie between -1 and 1", got=f"{min_cos:g}: pass for example 0.5")


def make_aim(text: str, *, source: DataSource, classifier: Classifier, resolution: int, min_cos: float = 0.5) -> Aim:
    """Return what a goal's text stands for with this model and data.

    Raises:
        UserError: an unknown class or level, no class tree, a model that never refuses, no encoder, no such file.

    Example:
        >>> from robustvlm.data import open_data
        >>> from robustvlm.defenses import load_classifier
        >>> emoji = open_data("emoji")
        >>> model = load_classifier("tiny", emoji.class_names, emoji.templates)
        >>> [goal.spec for goal in make_aim("superclass:matrix", source=emoji, classifier=model, resolution=64).goals]
        ['superclass:0', 'superclass:1', 'superclass:2', 'superclass:all']
    """
    check_goal(text, min_cos)
    vlm, embeddings = classifier.vlm, classifier.class_embeddings
    known = Known(
        classifier.spec,
        source.class_names,
        classifier.can_reject,
        embeddings=None if embeddings is None else embeddings.detach(),
        head=None if vlm is None or embeddings is None else (vlm.logit_scale * embeddings).detach(),
        feature_of=lambda target: _feature_of(target, _encoder(classifier), resolution),
        trees=source.tree,
        data=source.spec,
        min_cos=min_cos,
    )
    goals = read_goals(text, known)
    return Aim(text.strip(), goals, Features(_encoder(classifier)) if goals[0].of_features else classifier)


def _encoder(classifier: Classifier) -> VLM:
    if classifier.vlm is None or classifier.class_embeddings is None:
        raise UserError(f"feature goals need an image encoder, and '{classifier.spec}' has none: pass a VLM")
    return classifier.vlm


def _feature_of(target: str, vlm: VLM, resolution: int) -> tuple[Tensor, bool]:
    """Return the unit feature [D] of a picture's file or else of a text, and whether it was a picture."""
    with torch.no_grad():
        if Path(target).suffix.lower() not in image_suffixes():
            return vlm.encode_text([target])[0], False
        pixels = _picture(target, vlm.framing.at(resolution)).to(vlm.device)
        return vlm.encode_image(pixels[None])[0], True


def _picture(path: str, framing: Framing) -> Tensor:
    if not Path(path).exists():
        raise UserError(f"no picture at '{path}' to aim at")
    found = decode(path, Path(path), UNKNOWN)
    if isinstance(found, Unreadable):
        raise UserError(f"cannot read the picture '{path}' to aim at: {found.reason}")
    return to_pixels(found.image, framing)
