"""From a spec to a model or a classifier: operators applied, folders of this program's models, the user's own."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustvlm.core.probe import change_of
from robustvlm.core.ranks import resolve_device
from robustvlm.core.registry import create, names_a_callable
from robustvlm.core.user_code import named_by
from robustvlm.defenses.abstaining import Abstaining
from robustvlm.defenses.answering import Answering, asking, speaker_of
from robustvlm.defenses.classifier import Classifier, Refusing, ZeroShot
from robustvlm.defenses.library import ClassifierVLM, load_library, names_library_model
from robustvlm.defenses.own import OwnClassifier, load_own
from robustvlm.defenses.smoothing import DEFAULT_N0, DUAL_FORM, FORM, Rule, SmoothedVLM, rule_of, smoothed_as
from robustvlm.defenses.specs import Operation, split_rejection, split_spec
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.base import DEFENCES
from robustvlm.defenses.zoo.unpublished import unpublished
from robustvlm.defenses.zoo.wrap import DefendedClassifier, DefendedVLM
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM, load_model, zero_shot
from robustvlm.models.custom import wrap_encoder
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, read_card, require_ground

if TYPE_CHECKING:
    from robustvlm.certify import OpensetRule
    from robustvlm.certify.threats import Noise

# The operators of a spec: `MODEL+operator:arguments` taken apart


# Models that this program made: which part of it loads which kind of folder

KINDS = {
    "finetune": "robustvlm.defenses.finetune.saved:FinetunedModel",
    "soup": "robustvlm.defenses.finetune.saved:FinetunedModel",
    "purify": "robustvlm.defenses.purify.parts:PurifiedModel",
    "immunize": "robustvlm.defenses.immunity.saved:ImmunisedModel",
    "tune-prompts": "robustvlm.defenses.prompts:PromptTunedModel",
    "build": "robustvlm.defenses.assemble:BuiltModel",
}
"""Where the loader of each kind of folder is found; imported when it is needed."""

_loading: ContextVar[tuple[Path, ...]] = ContextVar("loading", default=())


@dataclass(frozen=True)
class SavedModel(ABC):
    """A folder with a card, as a model; a kind says how to make its encoder, and its classifier if it has a head.

    Attributes:
        folder: where its files are.
        card: what it says of itself.
        question: put to every image in place of the base model's own ("FOLDER#QUESTION"); "": the base model's.
    """

    folder: Path
    card: Card
    question: str = ""

    @abstractmethod
    def encoder(self, device: torch.device) -> VLM:
        """Return the encoder, frozen, on `device`; whatever belongs inside a smoothing expectation is part of it."""

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the classifier on `encoder`, which is `self.encoder(...)`, perhaps smoothed: zero-shot by default."""
        return ZeroShot(zero_shot(encoder, class_names, templates, cache=cache)).eval()

    @property
    def refuses(self) -> bool:
        """Whether its classifier may reject images, by a rule that certificates know."""
        return False

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that the model was made for, where it knows no others; None: any classes will do."""
        return None

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        """Return unit vectors [K, D] that stand for the classes in place of their texts; None: the texts do.

        Raises:
            UserError: a head of its own that says nothing of its vectors: certificates by texts would be about another.
        """
        del class_names
        if type(self).classifier is not SavedModel.classifier:
            raise UserError(
                f"'{self.folder}' ({self.card.kind}) tells classes apart by a head of its own, and names no class "
                "vectors to certify: pass --claim feature, which is about its encoder"
            )
        return None

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule | None:
        """Return the rule by which the model behind noise of `sigma` accepts and rejects; None for one without.

        Args:
            tau: threshold for all classes in place of the model's: the rule is then no longer the deployed one.

        Raises:
            UserError: what the deployed model does under this noise is no such rule.
        """
        del class_names, sigma, tau
        return None

    def voting(self, encoder: VLM, class_names: Sequence[str], noise: Noise) -> VLM:
        """Return what single noisy copies vote for, a class or none of them, as an encoder of features [B, K + 1].

        Raises:
            UserError: a model that never refuses, or one without thresholds for copies at this noise.
        """
        del encoder, class_names, noise
        raise UserError(f"'{self.folder}' never refuses an image, so that no copy votes for none of the classes")

    def require_votes(self, noise: Noise) -> None:
        """Refuse a head that has no thresholds for copies that vote at this noise; others have none to miss."""
        del noise

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """Noise levels for whose mean features its head has thresholds, and judges the mean as certificates do."""
        return ()

    @property
    def noise(self) -> Noise | None:
        """The noise of a smoothing that is part of the model, None without one."""
        return None

    @property
    def rule(self) -> Rule | None:
        """How it answers from the copies of a smoothing that is part of it; None: it always answers."""
        return None

    def base(self, device: torch.device) -> VLM:
        """Return the model that this one stands on.

        Raises:
            UserError: the card names none, it is gone, it has changed since, or the models stand on each other.
        """

        if self.card.base is None:
            raise UserError(f"the card of '{self.folder}' names no base model: make the model again")
        with _once(self.folder), named_by(f"the card of '{self.folder}'"):
            vlm = load_pipeline(self.card.base, device=device)
        require_same_base(self.card, vlm, self.folder)
        return vlm


def require_same_base(card: Card, vlm: VLM, folder: Path) -> None:
    """Refuse another model than the one that a folder was made for, by its digest and by what it answers.

    Raises:
        UserError: what differs.
    """
    different = None
    if card.base_fingerprint not in (None, vlm.fingerprint):
        different = "its weights or settings are others"
    elif card.base_probe is not None:
        different = change_of(card.base_probe, probe_encoder(vlm))
    if different is not None:
        raise UserError(
            f"the model '{card.base}' is no longer the one that '{folder}' was made for ({different}): "
            "bring that one back, or make this one again"
        )


def saved_model(spec: str) -> SavedModel | None:
    """Return the model of a folder with a card; None for any other spec.

    Raises UserError for a kind that this version does not know.
    """
    place, question = _split_question(spec)
    card = read_card(Path(place)) if os.path.isdir(place) else None
    if card is None:
        return None
    require_ground(Path(place), card)
    if card.kind not in KINDS:
        raise UserError(f"'{spec}' is a model of the unknown kind '{card.kind}'; {nearest(card.kind, KINDS)}")
    module, _, name = KINDS[card.kind].partition(":")
    loader: type[SavedModel] = getattr(import_module(module), name)
    return loader(Path(place), card, question)


def _split_question(spec: str) -> tuple[str, str]:
    """Split `FOLDER[#QUESTION]` into the folder and the question; a folder whose name has a # stays whole."""
    whole = os.path.expanduser(spec)
    place, _, question = whole.partition("#")
    if os.path.isdir(whole) or not os.path.isdir(place):
        return whole, ""
    if not question.strip():
        raise UserError(f"'{spec}' asks nothing: write FOLDER#QUESTION, or leave out the #")
    return place, question.strip()


@contextmanager
def _once(folder: Path) -> Iterator[None]:
    """Refuse to load a folder while it is being loaded: a card that leads back to itself would never end."""
    here = folder.resolve()
    if here in _loading.get():
        raise UserError(f"the model '{folder}' stands on itself: its {', '.join(map(str, _loading.get()))} lead back")
    token = _loading.set((*_loading.get(), here))
    try:
        yield
    finally:
        _loading.reset(token)


# From `MODEL+operator:arguments` to a model with the defences the operators name, applied from left to right


@dataclass(frozen=True)
class Operator:
    """What an operator name stands for: how it is written, what it does, and the function that applies it."""

    form: str
    meaning: str
    apply: Callable[[VLM, Operation], VLM]


@torch.inference_mode(False)
def load_pipeline(spec: str, *, device: str | torch.device = "cpu") -> VLM:
    """Return the model that `spec` names: any spec of `load_model`, a folder made by this program, or a classifier of
    timm or torchvision seen as an encoder, then +operators.

    Operators and their arguments are checked before the model is loaded. Raises UserError for an unknown operator or
    wrong arguments, and whatever `load_model` raises.

    Example:
        >>> load_pipeline("tiny+smooth:0.25:8").encode_image(torch.rand(2, 3, 64, 64)).norm(dim=-1).round(decimals=4)
        tensor([1., 1.])
    """
    base, operations = split_spec(spec)
    check_operations(spec, operations)
    made = saved_model(base)
    vlm: VLM
    if names_library_model(base):
        vlm = ClassifierVLM(load_library(base)).to(resolve_device(device))
    elif made is None:
        vlm = load_model(base, device=device)
    else:
        vlm = made.encoder(resolve_device(device))
        vlm = asking(vlm, made.question) if made.question else vlm
        vlm.spec = base
    return apply_operations(vlm, operations)


def apply_operations(vlm: VLM, operations: Sequence[Operation]) -> VLM:
    """Return a model with the defences that the operations name, applied from left to right.

    Example:
        >>> apply_operations(load_model("tiny"), [Operation("smooth", ("0.25", "8"))]).spec
        'tiny+smooth:0.25:8'
    """
    for operation in operations:
        vlm = operator(operation.name).apply(vlm, operation)
    return vlm


def operators() -> dict[str, Operator]:
    """Return every operator by name, the published test-time defences included.

    Example:
        >>> {"smooth", "bits", "ttc"} <= set(operators()), operators()["smooth"].form
        (True, 'smooth:[THREAT=]SIGMA[:N0[:ALPHA[:vote]]]')
    """
    return OPERATORS | {name: operator(name) for name in DEFENCES}


def operator(name: str) -> Operator:
    """Return the operator of a known name."""
    if name in OPERATORS:
        return OPERATORS[name]
    about = DEFENCES[name].about
    return Operator(zoo.form_of(name), about.summary, _defend)


def check_operations(spec: str, operations: Sequence[Operation]) -> None:
    """Raise UserError for an unknown operator of `spec` or wrong arguments: they should not wait for a large model.

    Example:
        >>> check_operations("tiny+smooth:0.25", [Operation("smooth", ("0.25",))])
    """
    for operation in operations:
        reason = unpublished(operation.name, operation.arguments)
        if reason is not None:
            raise UserError(
                f"'+{operation}' in '{spec}' ({reason.title}) cannot be run: {reason.reason}; `robustvlm judge` shows "
                "it as not reproduced"
            )
        if operation.name not in OPERATORS and operation.name not in DEFENCES:
            forms = "".join(f"; MODEL+{known.form} is {known.meaning}" for known in OPERATORS.values())
            hint = nearest(operation.name, [*OPERATORS, *DEFENCES])
            raise UserError(f"unknown operator '+{operation.name}' in '{spec}': {hint}{forms}")
    apply_operations(_Unloaded(), operations)


class _Unloaded(VLM):
    """A stand-in that has a spec and nothing else."""

    def __init__(self) -> None:
        super().__init__(spec="MODEL", image_size=1, logit_scale=1.0)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a stand-in encodes nothing")

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        raise NotImplementedError("a stand-in encodes nothing")


def _defend(vlm: VLM, operation: Operation) -> VLM:
    defence = zoo.read_defence(operation.name, operation.arguments)
    if isinstance(defence, zoo.AnswerDefence):
        raise UserError(
            f"'+{defence}' needs classes and gives logits, and here '{vlm.spec}' is used as an encoder: it is for "
            "attack, evaluate, predict and judge, as the last operator but for +reject (goals about classes only)"
        )
    if rule_of(vlm) is not None:
        raise UserError(
            f"'{vlm.spec}' answers from its copies, and '+{defence}' behind it would answer otherwise: smooth the "
            f"defended model, as MODEL+{defence}+smooth:SIGMA:N0:ALPHA, or leave out ALPHA"
        )
    before = _feature_defence(vlm)
    if isinstance(defence, zoo.FeatureDefence) and before is not None:
        raise UserError(f"'{vlm.spec}+{defence}': +{before} works on features already, and only one defence may")
    assert isinstance(defence, zoo.PixelDefence | zoo.FeatureDefence)
    return DefendedVLM(vlm, defence)


def _feature_defence(vlm: VLM) -> zoo.Defence | None:
    found = (part.defence for part in vlm.modules() if isinstance(part, DefendedVLM))
    return next((defence for defence in found if isinstance(defence, zoo.FeatureDefence)), None)


def _dual(vlm: VLM, operation: Operation) -> VLM:
    from robustvlm.defenses.local_noise import dual_as  # certificates' mathematics, loaded where it is used

    return dual_as(vlm, str(operation))


OPERATORS = {
    "smooth": Operator(
        form=FORM,
        meaning=f"the model averaged over N0 noisy copies of the image (default {DEFAULT_N0}), noise of SIGMA in [0, 1]"
        " pixels, or of a THREAT as brightness=0.2 (`certify --threat` names them); with ALPHA, as 0.001, it answers "
        "only where the copies, their mean or with :vote their vote, decide the class at that probability of error",
        apply=lambda vlm, operation: smoothed_as(vlm, str(operation)),
    ),
    "dual": Operator(
        form=DUAL_FORM,
        meaning="the same with a noise level for each image: half of N0 copies, at noise AT, vote by their top margin "
        "for one of SIGMAS (THRESHOLDS between them), the others answer at that level; it always abstains, at 0.001 "
        "by default",
        apply=_dual,
    ),
}
"""Every operator by name but the published defences, which stand in a table of their own (`operators` has all)."""


# From a spec to the classifier that is attacked or evaluated: zero-shot, the user's own, perhaps with refusal


@torch.inference_mode(False)
def load_classifier(
    spec: str,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    cache: bool = True,
) -> Classifier:
    """Return the classifier that `spec` names over the given classes, frozen, in evaluation mode, on `device`.

    A spec is any of `load_pipeline`, read as a zero-shot classifier; or a classifier of timm or torchvision; or
    `module:callable` whose object has no `encode_text` but classifies: called with pixels [B, 3, S, S] in [0, 1] it
    returns logits [B, K], and it has an `image_size` S. Optional attributes: `can_reject` (the output has the
    acceptance score as one column more), `interpolation`, `differentiable`, `surrogate`. Either may end in `+reject:T`.

    Raises:
        UserError: no such model, wrong operators, or an output that does not fit the classes.

    Example:
        >>> load_classifier("tiny+reject:0.5", ["apple", "dog"], ["{}"], cache=False).can_reject
        True
    """
    place = resolve_device(device)
    base, threshold = split_rejection(spec)
    inner = _load(base, class_names, templates, place, cache)
    if threshold is None:
        return inner
    if inner.can_reject:
        raise UserError(f"'{base}' refuses images by itself already: leave out +reject:{threshold:g}")
    return Refusing(inner, threshold).eval()


def _load(
    spec: str, class_names: Sequence[str], templates: Sequence[str], place: torch.device, cache: bool
) -> Classifier:
    base, operations = split_spec(spec)
    if not operations:
        return _load_undefended(spec, class_names, templates, place, cache)
    *before, last = operations
    check_operations(spec, [operation for operation in operations if not _answers(operation)])
    early = next((operation for operation in before if _answers(operation)), None)
    if early is not None:
        raise UserError(f"'{spec}': +{early} gives logits, so that only +reject:T may follow it: leave out one of them")
    if _answers(last):
        defence = zoo.read_defence(last.name, last.arguments)
        inner = _load("+".join([base, *map(str, before)]), class_names, templates, place, cache)
        return DefendedClassifier(inner, defence)
    if names_a_callable(base) and all(operation.name in DEFENCES for operation in operations):
        inner = _load_undefended(base, class_names, templates, place, cache)
        if isinstance(inner, OwnClassifier):  # an encoder of the user's is defended as any other
            for operation in operations:
                inner = DefendedClassifier(inner, zoo.read_defence(operation.name, operation.arguments))
            return inner
    return _load_undefended(spec, class_names, templates, place, cache)


def _answers(operation: Operation) -> bool:
    return operation.name in DEFENCES and issubclass(DEFENCES[operation.name], zoo.AnswerDefence)


def _load_undefended(
    spec: str, class_names: Sequence[str], templates: Sequence[str], place: torch.device, cache: bool
) -> Classifier:
    found = _load_always_answering(spec, class_names, templates, place, cache)
    if rule_of(found.vlm) is None or found.withholds:
        return found
    if not isinstance(found, ZeroShot) or not isinstance(found.vlm, SmoothedVLM):
        raise UserError(
            f"'{spec}' cannot abstain: the rule of +smooth:SIGMA:N0:ALPHA is for classes told apart by their texts or "
            "vectors, right behind the smoothing; leave out ALPHA"
        )
    if found.vlm.per_image:
        from robustvlm.defenses.local_noise import LocallyAbstaining  # as above

        return LocallyAbstaining(found).eval()
    return Abstaining(found).eval()


def _load_always_answering(
    spec: str, class_names: Sequence[str], templates: Sequence[str], place: torch.device, cache: bool
) -> Classifier:
    if names_library_model(spec) and not split_spec(spec)[1]:
        return load_own(load_library(spec).for_classes(class_names), spec, class_names, place)
    if not names_a_callable(spec) or os.path.isdir(spec):
        vlm = load_pipeline(spec, device=place)
        made = saved_model(split_spec(spec)[0])
        if speaker_of(vlm) is not None:
            return Answering(vlm, class_names).to(place)
        if made is not None:
            return made.classifier(vlm, class_names, templates, cache=cache)
    else:
        thing = create(spec)
        if not hasattr(thing, "encode_text") and not hasattr(thing, "encode_image"):
            return load_own(thing, spec, class_names, place)
        vlm = wrap_encoder(thing, spec, place)
    return ZeroShot(zero_shot(vlm, class_names, templates, cache=cache)).eval()
