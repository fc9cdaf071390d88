"""How much of the neighbourhood antibodies cover: each class left out in turn, with what was written for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.immunity.antibodies import (
    Antibodies,
    AntibodyText,
    Band,
    Proposal,
    filter_antibodies,
    neighbourhood,
    noise_antibodies,
)
from robustvlm.errors import UserError

NAMES = ["wolf", "dog", "teapot"]
TEXT = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]), dim=1)


def bank(*rows: tuple[str, str, Sequence[float]]) -> tuple[Proposal, Antibodies]:
    texts = tuple(AntibodyText(text, of_class) for text, of_class, _ in rows)
    return Proposal(texts), Antibodies(texts, F.normalize(torch.tensor([list(row) for _, _, row in rows]), dim=1))


def test_an_antibody_covers_the_class_beside_it_and_never_its_own() -> None:
    _, kept = bank(("fox", "dog", [0.95, 0.1, 0.0]))
    found = neighbourhood(kept, TEXT, NAMES)
    # For the wolf the fox of the dogs is nearer than the dog; the dog has lost its fox; nothing lies at the teapot.
    assert found.covered.tolist() == [True, False, False]
    assert float(found.to_class[0]) == pytest.approx(0.8)
    assert float(found.to_antibody[0]) == pytest.approx(0.95 / (0.95**2 + 0.1**2) ** 0.5)
    assert float(found.to_antibody[1]) == -1.0


def test_names_that_the_filters_dropped_come_back_for_the_class_that_they_name() -> None:
    proposal, kept = bank(("fox", "dog", [0.0, 1.0, 0.0]), ("Wolves", "dog", [1.0, 0.0, 0.0]))
    found = neighbourhood(Antibodies(kept.texts[:1], kept.embeddings[:1]), TEXT, NAMES, proposal=proposal)
    assert found.named.tolist() == [True, False, False]
    assert found.covered.tolist() == [True, False, False]
    own = Proposal((AntibodyText("wolf", "wolf"),))
    assert not neighbourhood(kept, TEXT, NAMES, proposal=own).named.any()
    kin = Proposal((AntibodyText("grey hunter", "dog"),), {"wolf": ("grey hunter",)})
    assert neighbourhood(kept, TEXT, NAMES, proposal=kin).named.tolist() == [True, False, False]


def test_a_name_that_the_band_would_have_dropped_does_not_come_back() -> None:
    proposal, kept = bank(("wolf", "dog", [1.0, 0.0, 0.0]))
    inside, too_near, too_far = (
        bool(neighbourhood(kept, TEXT, NAMES, proposal=proposal, band=band).named[0])
        for band in (Band(0.5, 0.9), Band(0.5, 0.7), Band(0.85, 0.9))
    )
    assert (inside, too_near, too_far) == (True, False, False)


def test_coverage_foretells_what_a_class_that_is_really_left_out_meets() -> None:
    draws = torch.Generator().manual_seed(0)
    names = [f"thing{k}" for k in range(12)]
    text = F.normalize(torch.randn(12, 6, generator=draws), dim=1)
    extra = F.normalize(torch.randn(60, 6, generator=draws), dim=1)
    rows: dict[str, Tensor] = {f"other{i}": extra[i] for i in range(60)} | dict(zip(names, text, strict=True))
    texts = [AntibodyText(f"other{i}", names[i % 12]) for i in range(60)]
    texts += [AntibodyText(names[k], names[k - 1]) for k in (2, 5)]
    proposal, band = Proposal(tuple(texts)), Band(-0.5, 0.8)

    def embed(asked: Sequence[str]) -> Tensor:
        return torch.stack([rows[name] for name in asked])

    kept = filter_antibodies(proposal, embed, text, names, band=band).kept
    foretold = neighbourhood(kept, text, names, proposal=proposal, band=band).covered
    for k, name in enumerate(names):
        left = [i for i in range(12) if i != k]
        others = Proposal(tuple(item for item in texts if item.of_class != name))
        known = [names[i] for i in left]
        really = filter_antibodies(others, embed, text[left], known, band=band).kept
        met = float((text[k] @ really.embeddings.T).max()) > float((text[k] @ text[left].T).max())
        # Without the class, texts that were too near to it alone come in too: coverage is foretold from below.
        assert met >= bool(foretold[k])


def test_noise_covers_nothing_and_one_class_has_no_neighbourhood() -> None:
    draws = torch.Generator().manual_seed(0)
    family = F.normalize(torch.randn(64, generator=draws), dim=0)
    text = F.normalize(family + 0.05 * torch.randn(20, 64, generator=draws), dim=1)
    names = [str(k) for k in range(20)]
    assert not neighbourhood(noise_antibodies(200, 64, seed=0), text, names).covered.any()
    with pytest.raises(UserError, match="one class of several"):
        neighbourhood(noise_antibodies(2, 3, seed=0), TEXT[:1], NAMES[:1])
