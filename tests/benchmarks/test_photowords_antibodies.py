"""The benchmark of antibodies: what is struck from the texts, and what is read off a score."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.photowords.antibodies import coverage_table, judged, proposals, shared, table, unnamed
from robustvlm.defenses.immunity.antibodies import AntibodyText, Proposal
from robustvlm.detect.base import Head


def test_nothing_that_names_an_unknown_class_or_a_synonym_of_it_stays() -> None:
    found = proposals(["tabby cat", "red fox", "lemon"])
    assert set(found) == {"bank", "superclasses"}
    for proposal in found.values():
        texts = [item.text for item in proposal.texts]
        left = {item.text for item in unnamed(proposal, ["kit fox", "Egyptian Mau"]).texts}
        assert left <= set(texts)
        assert not {"kit fox", "egyptian mau"} & left
    assert {"kit fox", "egyptian mau"} <= {item.text for item in found["bank"].texts}
    synonym = Proposal((AntibodyText("swift fox", "red fox"), AntibodyText("desert kit fox", "red fox")))
    assert unnamed(synonym, ["kit fox"]).texts == ()  # another name of it, and a kind of it


def test_a_score_that_parts_all_is_read_as_one() -> None:
    known, near, far = (torch.full((200, 1), value) + 0.01 * torch.rand(200, 1) for value in (0.9, 0.5, 0.1))
    row = judged(lambda rows: rows[:, 0], known, {"known": known, "near": near, "far": far})
    assert row.auroc == {"near": 1.0, "far": 1.0}
    assert row.fpr == {"near": 0.0, "far": 0.0}
    assert row.accepted["near"] == row.accepted["far"] == 0.0
    assert row.accepted["known"] == pytest.approx(0.95, abs=0.02)
    assert "+0.0000" in table([{"max cosine": row, "other": row}] * 3)
    assert "| bank | 4 | 0.50 | 0.25 | 0.00 |" in coverage_table([{"bank": [4, 0.5, 0.25, 0.0]}] * 2)


def test_the_share_is_that_of_the_classes_among_classes_and_texts() -> None:
    rows = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    classes, texts = torch.eye(8)[:3], torch.eye(8)[3:]
    logits = 10 * rows @ torch.cat([classes, texts]).T
    wanted = (rows @ classes.T).amax(dim=1) + logits.softmax(dim=1)[:, :3].sum(dim=1)
    assert shared(Head(classes, 10.0), texts)(rows).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
