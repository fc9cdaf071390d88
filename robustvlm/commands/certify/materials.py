"""What a run's claim is about: classes, texts and their wordings, a gallery, antibodies, an open-set rule."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from robustvlm.certify import OpensetRule
from robustvlm.certify.claims import (
    Materials,
    find_claim,
)
from robustvlm.certify.normal import Array
from robustvlm.certify.wordings import Wordings
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.commands.certify.gallery import Gallery
from robustvlm.commands.certify.wordings import make_wordings, read_by_turns, texts_of
from robustvlm.data.classes import read_class_names
from robustvlm.defenses.answering import AnswerVLM, speaker_of, token_shape
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.specs import split_spec
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM, zero_shot
from robustvlm.models.zero_shot import class_embeddings


def antibodies_of(config: CertifyConfig) -> tuple[str, ...]:
    return () if config.antibodies is None else list_of_names(Path(config.antibodies))


def materials_of(
    config: CertifyConfig,
    vlm: VLM,
    text: Array | None,
    templates: tuple[str, ...],
    *,
    rule: OpensetRule | None = None,
    rounding: float = 0.0,
    baselines: bool = True,
    gallery: Gallery | None = None,
    wordings: Wordings | None = None,
) -> Materials:
    """Return what a run's claim is about: classes or a gallery, the antibodies that were given, an open-set rule."""
    given, (tokens, length) = rule is None and config.antibodies is not None, token_shape(vlm)
    return Materials(
        text=text if gallery is None else gallery.vectors,
        entries=None if gallery is None else gallery.labels,
        against=_array(class_embeddings(vlm, antibodies_of(config), templates)) if given else None,
        rule=rule,
        rounding=rounding,
        baselines=baselines,
        logit_scale=vlm.logit_scale,
        tokens=tokens,
        width=tokens * length,
        wordings=wordings,
    )


def wordings_of(
    config: CertifyConfig, vlm: VLM, text: Array | None, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Wordings | None:
    """Return all wordings that a run's certificates hold for; None where they are about the usual texts.

    Raises:
        UserError: a model that answers in words, or a file of another form.
    """
    if config.paraphrases is None or text is None:
        return None
    made = saved_model(split_spec(config.model)[0])
    own = vlm.class_vectors(class_names) if made is None else made.class_vectors(class_names)
    if speaker_of(vlm) is not None or own is not None:
        raise UserError(
            f"'{config.model}' tells classes apart by no texts that could be put otherwise: leave out "
            f"{setting('paraphrases')}"
        )
    if config.words is not None:
        return read_by_turns(vlm, texts_of(config.paraphrases, class_names, templates))
    return make_wordings(config.paraphrases, vlm, text, class_names, templates)


def rule_of(config: CertifyConfig, class_names: tuple[str, ...]) -> OpensetRule | None:
    """Return the open-set rule of a model that has one, with `--tau` in place of its thresholds if that was given.

    Raises:
        UserError: the deployed model follows another rule under this noise.
    """
    made = saved_model(split_spec(config.model)[0]) if find_claim(config.claim).head == "rule" else None
    return None if made is None else made.openset_rule(class_names, config.sigma, config.tau)


def vectors_of_classes(
    config: CertifyConfig, vlm: VLM, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Array | None:
    """Return unit class vectors [K, D]: those of a model that has its own, else the texts.

    Raises:
        UserError: a claim about classes, and the model has no single vector for each.
    """
    claim = find_claim(config.claim)
    if claim.head == "votes":
        return np.eye(len(class_names) + 1)
    own = own_vectors(config, class_names)
    if own is not None:
        return _array(own)
    return embed_classes(vlm, class_names, templates, needed=claim.needs_classes)


def own_vectors(config: CertifyConfig, class_names: Sequence[str]) -> Tensor | None:
    """Return the vectors that a model has in place of texts, as far as a claim is about them; None: the texts stay.

    Raises:
        UserError: the model has no single vector for each class, or names none.
    """
    made, head = saved_model(split_spec(config.model)[0]), find_claim(config.claim).head
    # A claim on an open-set rule is about vectors too, where the model has no such rule of its own.
    if made is None or not (head == "vectors" or (head == "rule" and not made.refuses)):
        return None
    return made.class_vectors(class_names)


def list_of_names(path: Path) -> tuple[str, ...]:
    """Return the class names of a file that lists them; UserError for one that maps labels to names."""
    names, _ = read_class_names(path)
    if not isinstance(names, tuple):
        raise UserError(f"'{path}' maps labels to names: expected a list, one name a line")
    return names


def embed_classes(
    vlm: VLM, class_names: tuple[str, ...], templates: tuple[str, ...], *, needed: bool = True
) -> Array | None:
    """Return the unit class embeddings [K, D]; where they are only for information, None for fewer than two classes
    or a model that answers in words."""
    if not needed and (len(class_names) < 2 or (speaker_of(vlm) is not None and not isinstance(vlm, AnswerVLM))):
        return None
    return _array(zero_shot(vlm, class_names, templates).class_embeddings)


def _array(embeddings: Tensor) -> Array:
    return np.asarray(embeddings.detach().double().cpu().numpy())
