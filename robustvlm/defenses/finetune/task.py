"""Fine-tuning as a task of the training engine, and its methods by name."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from robustvlm.core import registry
from robustvlm.core.registry import Table
from robustvlm.data.trees import Forest
from robustvlm.defenses.finetune.distill import Distill
from robustvlm.defenses.finetune.guided import AGFT, PMG, UCAT
from robustvlm.defenses.finetune.hierarchical import Hierarchical
from robustvlm.defenses.finetune.methods import FARE, Clean, InnerAttack, Materials, Method, SimCLIP, TeCoA
from robustvlm.defenses.finetune.trainable import make_trainable, parse_trainable, vision_module
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws, Measure, Task

# The methods by name

METHODS: Table[type[Method]] = Table(
    __package__,
    {
        "hierarchical": Hierarchical,
        "tecoa": TeCoA,
        "fare": FARE,
        "pmg": PMG,
        "simclip": SimCLIP,
        "agft": AGFT,
        "ucat": UCAT,
        "distill": Distill,
        "clean": Clean,
    },
)
"""Every method, made as METHODS[name](materials, **options of its own)."""


def find_method(name: str) -> type[Method]:
    """Return a method by its name, or the class that `module:Class` names.

    Raises:
        UserError: it is neither, or no subclass of `Method`.

    Example:
        >>> find_method("tecoa").__name__
        'TeCoA'
    """
    found = registry.load(name, METHODS, "method")
    if name not in METHODS and not (isinstance(found, type) and issubclass(found, Method)):
        got = found.__name__ if isinstance(found, type) else type(found).__name__
        raise UserError(f"'{name}': expected a fine-tuning method (a subclass of robustvlm's Method), got {got}")
    return found


def require_teachable(method: str, taught: bool) -> None:
    """Raise a UserError where another model is to teach a method that learns from none."""
    if taught and not find_method(method).other_teacher:
        able = ", ".join(name for name, kind in METHODS.items() if kind.other_teacher)
        raise UserError(f"{method} learns from no other model: leave out {setting('teacher')}, or take {able}")


# Fine-tuning as a task of the training engine


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What to fine-tune, on which loss, against which attack.

    Args:
        method: a name of `METHODS`, or `module:Class` with a `Method` of your own.
        trainable: `all`, `lora[:RANK]`, `ssf` or `last:N`.
        attack: the inner attack.
        options: keyword arguments of the method: `options=HierarchicalOptions(...)` for hierarchical, `general`,
            `clean` and `reverse` for pmg, `scale` and `ratio` for agft, `weight` and `temperature` for ucat, `labels`
            and `features` for distill.
        seed: of the parameters that LoRA adds.

    Raises:
        UserError: an unknown method or subset.

    Example:
        >>> FinetuneSettings(method="tecoa").attack.steps
        3
    """

    method: str = "hierarchical"
    trainable: str = "all"
    attack: InnerAttack = field(default_factory=InnerAttack)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        find_method(self.method)
        parse_trainable(self.trainable)


class FinetuneTask(Task):
    """The loss of a method, whose student is the module that the engine trains."""

    best_by: str | None = "robust accuracy"

    def __init__(self, vlm: VLM, method: Method) -> None:
        super().__init__(vlm)
        self.vlm, self.method = vlm, method
        self.labelled = method.labelled

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        del step
        terms = self.method.terms(pixels, labels, draws)
        scalars = isinstance(terms, Mapping) and all(isinstance(t, Tensor) and not t.ndim for t in terms.values())
        if not scalars or "loss" not in terms or not terms["loss"].requires_grad:
            name, got = type(self.method).__name__, list(terms) if scalars else type(terms).__name__
            raise UserError(f"the method {name} must return scalars, 'loss' with a gradient among them: got {got}")
        return terms

    def validate(self) -> Mapping[str, Measure]:
        return self.method.measures()

    def costly(self) -> nn.Module:
        return vision_module(self.vlm)

    def compile(self) -> None:
        vision_module(self.vlm).compile()

    def checkpoint_gradients(self) -> bool:
        tower: Any = vision_module(self.vlm)
        if hasattr(tower, "set_grad_checkpointing"):
            tower.set_grad_checkpointing(True)
        return any(getattr(part, "grad_checkpointing", False) is True for part in tower.modules())


def finetune_task(
    vlm: VLM,
    settings: FinetuneSettings,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    calibration: Tensor,
    forest: Forest | None = None,
    in_place: bool = False,
    teacher: VLM | None = None,
) -> FinetuneTask:
    """Return the task that fine-tunes a copy of `vlm`, which is its `vlm`, with the parameters made ready.

    Args:
        vlm: on the device to train on. Batch normalisation keeps its statistics throughout.
        in_place: train `vlm` itself instead, which spares the memory of a copy.
        class_names, templates: of the training data.
        calibration: some training images [B, 3, S, S]; the same ones when a run is resumed.
        forest: class trees over the same classes.
        teacher: another model, on the same device, for methods that may learn from one.

    Raises:
        UserError: the model cannot be fine-tuned that way, or the method lacks something.

    Example:
        >>> import torch
        >>> from robustvlm.models import load_model
        >>> settings = FinetuneSettings(method="tecoa", trainable="last:1")
        >>> pixels = torch.rand(2, 3, 64, 64)
        >>> task = finetune_task(load_model("tiny"), settings, class_names=["cat", "dog"], templates=["{}"],
        ...                      calibration=pixels)
        >>> sorted(task.losses(pixels, torch.tensor([0, 1]), 0, Draws(0, 0, ["a", "b"])))
        ['loss']
    """
    kind = find_method(settings.method)
    vlm = vlm if in_place else copy.deepcopy(vlm)
    vlm.eval()
    require_teachable(settings.method, teacher is not None)
    if kind.needs_teacher:
        teacher = (copy.deepcopy(vlm) if teacher is None else teacher).eval().requires_grad_(False)
    embeddings = class_embeddings(vlm, class_names, templates, distinct=True)
    make_trainable(vlm, settings.trainable, seed=settings.seed)
    materials = Materials(
        student=vlm,
        attack=settings.attack,
        class_embeddings=embeddings,
        class_names=class_names,
        templates=templates,
        calibration=calibration,
        forest=forest,
        teacher=teacher,
        adapters=parse_trainable(settings.trainable)[0] in ("lora", "ssf"),
    )
    method = kind(materials, **settings.options)
    for parameter in method.also_trained():
        parameter.requires_grad_(True)
    return FinetuneTask(vlm, method)
