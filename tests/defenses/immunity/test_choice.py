"""The hinge that known images choose: which weight, from which cosine, and when the antibodies count for nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText, Returning, noise_antibodies
from robustvlm.defenses.immunity.choice import choose_hinge
from robustvlm.defenses.immunity.state import open_set_score
from robustvlm.errors import UserError

COUNT, DIM = 20, 64
NAMES = [f"class {k}" for k in range(COUNT)]


def classes() -> Tensor:
    """Prototypes in pairs of siblings, so that a class left out lies near one that is not."""
    draws = torch.Generator().manual_seed(0)
    family = F.normalize(torch.randn(COUNT // 2, DIM, generator=draws), dim=1).repeat_interleave(2, dim=0)
    return F.normalize(family + 0.03 * torch.randn(COUNT, DIM, generator=draws), dim=1)


def cloud(prototypes: Tensor, each: int = 10, noise: float = 0.08) -> tuple[Tensor, Tensor]:
    labels = torch.arange(COUNT).repeat_interleave(each)
    draws = torch.Generator().manual_seed(1)
    return F.normalize(prototypes[labels] + noise * torch.randn(len(labels), DIM, generator=draws), dim=1), labels


def siblings(prototypes: Tensor) -> Antibodies:
    """Antibodies that another class has written and that lie at a class: what a good bank does."""
    texts = tuple(AntibodyText(f"like {name}", NAMES[k ^ 1]) for k, name in enumerate(NAMES))
    return Antibodies(texts, prototypes)


def test_antibodies_that_name_what_is_left_out_get_weight_and_those_anywhere_get_none() -> None:
    prototypes = classes()
    features, labels = cloud(prototypes)
    noise = noise_antibodies(50, DIM, seed=0)
    told = Returning(prototypes, torch.arange(COUNT), torch.arange(COUNT) ^ 1)
    good = choose_hinge(features, labels, prototypes[:, None], noise, NAMES, returning=told)
    assert good.weight > 0
    assert good.gains[good.weight][0] > 0.01
    assert choose_hinge(features, labels, prototypes[:, None], noise, NAMES).weight == 0.0
    # What a class itself has written goes with it, and what names a class that is known never comes back.
    own = Returning(prototypes, torch.arange(COUNT), torch.arange(COUNT))
    assert choose_hinge(features, labels, prototypes[:, None], noise, NAMES, returning=own).weight == 0.0


def test_antibodies_of_a_class_go_with_it() -> None:
    # Each class has written a text at itself: with the class gone nobody would have, so nothing is to be gained.
    prototypes = classes()
    features, labels = cloud(prototypes)
    own = Antibodies(tuple(AntibodyText(f"like {name}", name) for name in NAMES), prototypes)
    found = choose_hinge(features, labels, prototypes[:, None], own, NAMES)
    assert found.weight == 0.0


def test_no_more_known_images_than_asked_are_touched_by_the_hinge() -> None:
    prototypes = classes()
    features, labels = cloud(prototypes)
    antibodies = siblings(prototypes)
    found = choose_hinge(features, labels, prototypes[:, None], antibodies, NAMES)
    plain = open_set_score(features, prototypes[:, None], antibodies.embeddings, 0.0)
    hinge = open_set_score(features, prototypes[:, None], antibodies.embeddings, 1.0, found.floor)
    assert float((hinge < plain - 1e-6).double().mean()) == pytest.approx(0.05, abs=0.01)


def test_nothing_to_choose_from() -> None:
    prototypes = classes()
    features, labels = cloud(prototypes)
    none = Antibodies((), torch.zeros(0, DIM))
    assert choose_hinge(features, labels, prototypes[:, None], none, NAMES).gains == {}
    one = choose_hinge(features[:10], labels[:10], prototypes[:1, None], siblings(prototypes), NAMES[:1])
    assert (one.weight, one.gains) == (0.0, {})
    with pytest.raises(UserError, match="needs images of known classes"):
        choose_hinge(features[:0], labels[:0], prototypes[:, None], none, NAMES)
