"""What `--goal` says, in terms of the model and the data: the goals to attack for, and what is attacked and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustvlm.attacks import (
    AcceptedMistake,
    Case,
    Deny,
    FeatureAway,
    FeatureTo,
    Goal,
    Intrude,
    Misclassify,
    Superclass,
    SuperclassAll,
    Targeted,
)
from robustvlm.core import registry
from robustvlm.core.framing import Framing
from robustvlm.data import DataSource
from robustvlm.data.decode import decode, image_suffixes
from robustvlm.data.names import name_key, places_of
from robustvlm.data.source import UNKNOWN, Unreadable, to_pixels
from robustvlm.data.trees import Tree
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.models import VLM
from robustvlm.runs.records import Check

FORMS = ("misclassify", "superclass:LEVEL", "superclass:all", "superclass:matrix", "targeted:CLASS", "deny", "intrude",
         "feature", "feature:FILE.png", "feature:TEXT")  # fmt: skip
KINDS = tuple(dict.fromkeys(form.partition(":")[0] for form in FORMS))


@dataclass(frozen=True)
class Aim:
    """What a run attacks for.

    Args:
        spec: as on the command line.
        goals: the goals, each attacked in turn; one, but for `superclass:matrix`.
        model: what is attacked: pixels to the goals' outputs.
        leave: an image leaves at its first success; otherwise every attack goes on to the end of its budget.
        unknown: images of unknown classes are attacked, instead of those of known ones.
        target: the class that images are to be taken for; those that belong to it are left out.
        notes: what the reader of the results has to know of the model.
    """

    spec: str
    goals: tuple[Goal, ...]
    model: nn.Module
    leave: bool = True
    unknown: bool = False
    target: int | None = None
    notes: tuple[Check, ...] = ()

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
        return (
            "of none of the classes: attacks need labelled images "
            f"(only {setting('goal', 'intrude')} takes unknown ones)"
        )


class Features(nn.Module):
    """The image encoder of a classifier: pixels [B, 3, H, H] to unit features [B, D]."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return self.vlm.encode_image(pixels)


def check_goal(text: str, min_cos: float = 0.5) -> tuple[str, str]:
    """Split `KIND[:REST]`, and refuse what no model or data could make right.

    Example:
        >>> check_goal("superclass:all")
        ('superclass', 'all')
    """
    kind, colon, rest = text.strip().partition(":")
    if kind not in KINDS and registry.names_own(own_spec(text)):
        return own_spec(text), text.strip()[len(own_spec(text)) + 1 :]
    if kind not in KINDS:
        forms = f"{', '.join(FORMS)}, or your own MODULE:CALLABLE"
        raise UserError(f"unknown goal '{text}': {nearest(kind, KINDS)} (forms: {forms})")
    needs = kind in ("superclass", "targeted")
    if needs and not rest.strip():
        raise UserError(f"the goal '{text}' says not which one: pass {' or '.join(f for f in FORMS if kind in f)}")
    if colon and not needs and (kind != "feature" or not rest.strip()):
        raise UserError(f"unknown goal '{text}': pass {' or '.join(form for form in FORMS if form.startswith(kind))}")
    if not -1 < min_cos < 1:
        raise BadSetting("min_cos", "must lie between -1 and 1", got=f"{min_cos:g}: pass for example 0.5")
    return kind, rest.strip()


def own_spec(text: str) -> str:
    """Return the `module:callable` at the head of a goal's text.

    Example:
        >>> own_spec("my.goals:Below:0.5")
        'my.goals:Below'
    """
    return ":".join(text.strip().split(":")[:2])


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
    kind, rest = check_goal(text, min_cos)
    if ":" in kind:
        return _own(text.strip(), kind, rest, source, classifier)
    if kind == "misclassify":
        return Aim(kind, (AcceptedMistake() if classifier.can_reject else Misclassify(),), classifier)
    if kind in ("deny", "intrude"):
        if not classifier.can_reject:
            raise UserError(
                f"the goal {kind} needs a model that may refuse, and '{classifier.spec}' never does: "
                f"pass for example '{classifier.spec}+reject:0.5'"
            )
        return Aim(kind, (Deny() if kind == "deny" else Intrude(),), classifier, unknown=kind == "intrude")
    if kind == "feature":
        return _feature(text.strip(), rest, classifier, resolution, min_cos)
    if classifier.can_reject:
        raise UserError(f"the goal {kind} is for models that never refuse: attack '{classifier.spec}' without refusal")
    if kind == "targeted":
        target = _class(rest, source.class_names)
        return Aim(text.strip(), (Targeted(target, source.class_names[target]),), classifier, target=target)
    goals = _superclass(rest, source)
    return Aim(text.strip(), goals, classifier, leave=len(goals) == 1)


def _own(text: str, spec: str, rest: str, source: DataSource, classifier: Classifier) -> Aim:
    """Return the aim of a user's goal, made from the class names and what follows in its text, after a trial."""
    if classifier.can_reject:
        raise UserError(f"'{spec}': a goal of your own is for models that never refuse, and '{classifier.spec}' may")
    given = (source.class_names, rest) if rest else (source.class_names,)
    goal: Goal = registry.expect(
        spec, registry.call(spec, registry.resolve(spec), "a goal", *given), Goal, "a goal", ("margin",)
    )
    logits = torch.linspace(-1, 1, 2 * len(source.class_names)).view(2, -1).sin().requires_grad_(True)
    case = Case(torch.tensor([0, 0]))
    margin = registry.call(spec, goal.margin, "a margin", logits, case)
    wanted = f"'{spec}': margin of outputs {list(logits.shape)} must return finite numbers [2] with a gradient"
    if not isinstance(margin, Tensor) or margin.shape != (2,) or not margin.requires_grad:
        raise UserError(f"{wanted}, got {f'shape {list(margin.shape)}' if isinstance(margin, Tensor) else margin!r}")
    alone = goal.margin(logits[:1], case.rows(torch.tensor([0])))
    if not margin.isfinite().all() or not torch.allclose(margin[:1], alone):
        raise UserError(f"{wanted}, each from its own row alone; got {margin.tolist()}")
    object.__setattr__(goal, "spec", text)
    return Aim(text, (goal,), classifier)


def _class(text: str, class_names: Sequence[str]) -> int:
    text = text.strip()
    (label,) = places_of([text], class_names)
    if label is not None:
        return label
    named = [name for name in class_names if name_key(name) == name_key(text)]
    if named:
        raise UserError(f"'{text}' may be any of {len(named)} classes: write one as it is, '{named[0]}'")
    if text.isascii() and text.isdigit() and int(text) < len(class_names):
        return int(text)
    raise UserError(f"'{text}' is none of the {len(class_names)} classes: {nearest(text, class_names)}")


def levels_of(tree: Tree, class_names: Sequence[str]) -> list[tuple[int, Tensor]]:
    """Return the levels of a tree that tell classes apart, with the superclass number of every class, int64 [K]."""
    found = []
    for level in range(tree.levels):
        index = {name: number for number, name in enumerate(tree.level_names(level))}
        if len(index) > 1:
            found.append((level, torch.tensor([index[tree.ancestor(name, level)] for name in class_names])))
    return found


def _superclass(text: str, source: DataSource) -> tuple[Goal, ...]:
    tree, prefix, which = _tree(text, source)
    levels = levels_of(tree, source.class_names)
    goals = [Superclass(groups, f"{prefix}{level}") for level, groups in levels]
    universal = SuperclassAll(goals)
    universal.spec = f"superclass:{prefix}all"
    if which == "all":
        return (universal,)
    if which == "matrix":
        return (*goals, universal)
    wanted = _level(which, tree)
    for (level, _), goal in zip(levels, goals, strict=True):
        if level == wanted:
            return (goal,)
    last = levels[-1][0]
    raise UserError(f"level {wanted} of the tree '{tree.root}' has one superclass only: pass a level from 0 to {last}")


def _tree(text: str, source: DataSource) -> tuple[Tree, str, str]:
    if source.tree is None:
        raise UserError(
            f"the data '{source.spec}' has no class tree, which superclass goals need: pass {setting('tree', 'FILE')}"
        )
    root, slash, which = text.rpartition("/")
    if slash:
        return source.tree[root], f"{root}/", which
    return source.tree[0], "", which


def _level(text: str, tree: Tree) -> int:
    """Return the level of a number or of the name of a superclass that stands in it."""
    if text.lstrip("-").isdigit():
        level = int(text)
        if not 0 <= level < tree.levels - 1:
            last = tree.levels - 2
            raise UserError(f"the tree '{tree.root}' has levels 0 (classes) to {last} below its root, got {level}")
        return level
    for level in range(tree.levels):
        if name_key(text) in map(name_key, tree.level_names(level)):
            return level
    words = {name for level in range(1, tree.levels - 1) for name in tree.level_names(level)}
    raise UserError(
        f"'{text}' is no level of the tree '{tree.root}': pass a number from 0 to {tree.levels - 2}, a superclass of "
        f"the level, all or matrix; {nearest(text, words | {'all', 'matrix'})}"
    )


def _feature(text: str, target: str, classifier: Classifier, resolution: int, min_cos: float) -> Aim:
    vlm, embeddings = classifier.vlm, classifier.class_embeddings
    if vlm is None or embeddings is None:
        raise UserError(f"feature goals need an image encoder, and '{classifier.spec}' has none: pass a VLM")
    head = (vlm.logit_scale * embeddings).detach()
    if not target:
        return Aim(text, (FeatureAway(min_cos, head=head),), Features(vlm), leave=False)
    with torch.no_grad():
        if Path(target).suffix.lower() in image_suffixes():
            pixels = _picture(target, vlm.framing.at(resolution)).to(vlm.device)
            goal = FeatureTo(vlm.encode_image(pixels[None])[0], name=target, head=head)
        else:
            goal = FeatureTo(vlm.encode_text([target])[0], rivals=embeddings.detach(), name=target, head=head)
    return Aim(text, (goal,), Features(vlm), leave=False)


def _picture(path: str, framing: Framing) -> Tensor:
    if not Path(path).exists():
        raise UserError(f"no picture at '{path}' to aim at")
    found = decode(path, Path(path), UNKNOWN)
    if isinstance(found, Unreadable):
        raise UserError(f"cannot read the picture '{path}' to aim at: {found.reason}")
    return to_pixels(found.image, framing)
