"""One door for every model: any spec, with operators, or a folder that this program made."""

import os
from collections.abc import Sequence

import torch

from robustvlm.core.ranks import resolve_device
from robustvlm.core.registry import create, names_a_callable
from robustvlm.data import DataSource, open_data
from robustvlm.data.classes import DEFAULT
from robustvlm.defenses import pipeline
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.library import load_library, names_library_model
from robustvlm.defenses.own import names_declared
from robustvlm.defenses.pipeline import load_pipeline, saved_model
from robustvlm.defenses.smoothing import Rule, dual_rule, read_rule
from robustvlm.defenses.specs import split_rejection, split_spec
from robustvlm.errors import UserError, arguments_named
from robustvlm.models import VLM


@arguments_named()
def load_model(spec: str, device: str | torch.device = "auto") -> VLM:
    """Return the encoder that `spec` names, frozen, in evaluation mode, on `device` ("auto": the best there is).

    Args:
        spec: "tiny", open_clip's "NAME/TAG", "NAME/FILE", "hf-hub:ORG/REPO", "transformers:FOLDER", a folder, also any
            that this program made, "module:callable", a classifier as "timm:resnet18", each with operators as
            "+smooth:0.25:64".

    Raises:
        UserError: there is no such model, or its weights cannot be had or do not fit.

    Example:
        >>> load_model("tiny+smooth:0.1:8", device="cpu").encode_image(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """
    return load_pipeline(_text(spec), device=device)


@arguments_named()
def load_classifier(
    spec: str,
    classes: Sequence[str] | DataSource | str | None = None,
    templates: Sequence[str] | None = None,
    *,
    device: str | torch.device = "auto",
) -> Classifier:
    """Return the classifier that `spec` names, frozen, in evaluation mode, on `device` ("auto": the best there is).

    Args:
        spec: as `load_model` takes them, and "+reject:T" behind; or "module:callable" whose object classifies.
        classes: class names, or data that has them, as `open_data` returns it or as its spec. Not needed for a model
            that knows its classes: one that was immunised or prompt-tuned, or an object of yours with `class_names`.
        templates: prompts with {} for the class name; default: the data's, else "a photo of a {}.".

    Raises:
        UserError: no such model, wrong operators, no classes, or an output that does not fit the classes.

    Example:
        >>> load_classifier("tiny+reject:0.5", ["apple", "dog"]).predict(torch.rand(1, 3, 64, 64)).rejected.shape
        torch.Size([1])
    """
    source = open_data(classes) if isinstance(classes, str) else classes
    if isinstance(source, DataSource):
        names, prompts = source.class_names, source.templates
    else:
        known = own_classes(_text(spec)) if source is None else source
        if known is None:
            raise UserError(f"'{spec}' knows no classes of its own: pass classes=[...], or data that has them")
        names, prompts = tuple(known), DEFAULT
    return pipeline.load_classifier(_text(spec), names, templates or prompts, device=resolve_device(device))


def own_classes(spec: str) -> Sequence[str] | None:
    """Return the classes that a model knows of itself: a folder with a head of its own, or an object that names them.

    Example:
        >>> own_classes("tiny") is None
        True
    """
    base, _ = split_rejection(spec)
    model = split_spec(base)[0]
    if names_library_model(model):
        return load_library(model).class_names
    made = saved_model(model)
    if made is None and names_a_callable(base) and not os.path.isdir(base):
        return names_declared(create(base), base)
    return None if made is None else made.class_names


def declared_rule(spec: str) -> Rule | None:
    """Return how a smoothed model answers, by its spec or its folder's card; None: as usual. Nothing is loaded.

    Example:
        >>> declared_rule("tiny+smooth:0.25:64:0.001:vote"), declared_rule("tiny+smooth:0.25:64") is None
        (Rule(alpha=0.001, votes=True), True)
    """
    base, operations = split_spec(spec)
    smoothing = [operation for operation in operations if operation.name in ("smooth", "dual")]
    if smoothing:
        return (dual_rule if smoothing[0].name == "dual" else read_rule)(str(smoothing[0]))
    made = saved_model(base)
    return None if made is None else made.rule


def _text(spec: str) -> str:
    if not isinstance(spec, str):
        raise UserError(f"spec must be a text that names a model, got a {type(spec).__name__}: pass for example 'tiny'")
    return spec
