"""Every score and metric beside an implementation of somebody else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detect_clouds import Clouds
from pytorch_ood import detector as other
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from robustvlm.detect import (
    ASH,
    GDA,
    KNN,
    MCM,
    MSP,
    SCORES,
    ClassMixtures,
    Energy,
    Head,
    Mahalanobis,
    MaxLogit,
    ReAct,
    ViM,
)
from robustvlm.detect.distances import ledoit_wolf_shrinkage
from robustvlm.detect.logits import GEN
from robustvlm.detect.metrics import all_metrics
from robustvlm.detect.mixtures import fit_probe


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> bool:
    """Their scores are high for unknown images."""
    return bool(torch.allclose(ours.double(), -theirs.double(), rtol=tolerance, atol=tolerance))


def test_scores_of_logits(clouds: Clouds) -> None:
    logits = clouds.head.logits(clouds.known)
    assert same(MSP(clouds.head).score(clouds.known).sigmoid(), other.MaxSoftmax.score(logits))
    assert same(MaxLogit(clouds.head).score(clouds.known), other.MaxLogit.score(logits))
    assert same(Energy(clouds.head).score(clouds.known), other.EnergyBased.score(logits))
    assert same(Energy(clouds.head, 2.5).score(clouds.known), other.EnergyBased.score(logits, t=2.5))
    # A mean, and of probabilities that are clamped: compared where none is as small as that.
    theirs = other.GEN.score(logits / 8, gamma=0.1, M=3)
    assert same(GEN(clouds.head, 8.0, leading=3).score(clouds.known), 3 * theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_mcm_is_theirs_through_the_logistic_function(clouds: Clouds, temperature: float) -> None:
    theirs = other.MCM(None, clouds.head.class_embeddings, temperature).predict_features(clouds.known)
    assert same(MCM(clouds.head, temperature).score(clouds.known).sigmoid(), theirs)


def test_mahalanobis_ranks_as_theirs(clouds: Clouds) -> None:
    """They do not divide by the number of images, halve, and add a small ridge: a monotone map, up to the ridge."""
    theirs = (
        other.Mahalanobis(None).fit_features(clouds.fit.float(), clouds.labels).predict_features(clouds.known.float())
    )
    ours = Mahalanobis("empirical").fit_features(clouds.fit, clouds.labels).score(clouds.known)
    assert torch.equal(ours.argsort(), (-theirs).argsort())
    assert same(ours / (2 * len(clouds.fit)), theirs, 1e-4)


def test_knn_is_theirs(clouds: Clouds) -> None:
    for k in (1, 7):
        theirs = other.KNN(None, k=k).fit_features(clouds.fit, clouds.labels).predict_features(clouds.unknown)
        assert same(KNN(k).fit_features(clouds.fit, clouds.labels).score(clouds.unknown), theirs)


def test_vim_is_theirs(clouds: Clouds) -> None:
    weight = clouds.head.logit_scale * clouds.head.class_embeddings
    theirs = other.ViM(None, 9, weight, torch.zeros(len(weight))).fit_features(clouds.fit, clouds.labels)
    ours = ViM(clouds.head, 9).fit_features(clouds.fit, clouds.labels)
    # They work in float32: equal up to its rounding, and in the same order.
    found = theirs.predict_features(clouds.unknown)
    assert same(ours.score(clouds.unknown), found, 1e-5)
    assert torch.equal(ours.score(clouds.unknown).argsort(), (-found).argsort())


def test_react_is_theirs(clouds: Clouds) -> None:
    def head(maps: Tensor) -> Tensor:
        return clouds.head.logits(maps.flatten(1))

    theirs = other.ReAct(None, head, percentile=0.8).fit_feature_maps(clouds.fit[..., None, None], clouds.labels)
    ours = ReAct(clouds.head, 80).fit_features(clouds.fit, clouds.labels)
    assert same(ours.score(clouds.known), theirs.predict_feature_maps(clouds.known[..., None, None]))


@pytest.mark.parametrize("variant", ["s", "p", "b"])
def test_ash_is_theirs_behind_a_relu(clouds: Clouds, variant: str) -> None:
    positive = clouds.known.abs()

    def head(maps: Tensor) -> Tensor:
        return clouds.head.logits(maps.flatten(1))

    theirs = other.ASH(None, head, variant=f"ash-{variant}", percentile=0.65)
    ours = ASH(clouds.head, variant, 65.0)  # type: ignore[arg-type]
    assert same(ours.score(positive), theirs.predict_feature_maps(positive.clone()[..., None, None]))


def test_gda_classifies_as_discriminant_analysis(clouds: Clouds) -> None:
    """Without the zero-shot half, and with the covariance as it is, it is Fisher's classifier."""
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(clouds.fit.numpy(), clouds.labels.numpy())
    head = Head(clouds.head.class_embeddings, 1e-9)
    ours = GDA(head, covariance="empirical").fit_features(clouds.fit, clouds.labels)
    gaps = theirs.decision_function(clouds.unknown.numpy())
    found = ours.logits(clouds.unknown)
    assert np.allclose(found - found.mean(1, keepdim=True), gaps - gaps.mean(1, keepdims=True), atol=1e-6)


def test_gda_precision_is_the_papers_up_to_its_factor(clouds: Clouds) -> None:
    """The paper: D ((N - 1) S + tr(S) I)^-1."""
    found = GDA(clouds.head).fit_features(clouds.fit, clouds.labels).gaussians
    assert found is not None
    centred = clouds.fit - found.means[clouds.labels]
    n, dim = centred.shape
    scatter = centred.T @ centred / n
    papers = dim * torch.linalg.inv((n - 1) * scatter + scatter.trace() * torch.eye(dim))
    assert torch.allclose(found.root @ found.root.T * dim / (n - 1), papers, rtol=1e-8)


def test_shrinkage_is_scikit_learns(clouds: Clouds) -> None:
    for rows in (6, 40, 200):
        centred = clouds.fit[:rows] - clouds.fit[:rows].mean(0)
        theirs = LedoitWolf(assume_centered=True).fit(centred.numpy()).shrinkage_
        assert ledoit_wolf_shrinkage(centred) == pytest.approx(theirs, abs=1e-10)


def test_mixtures_end_where_scikit_learn_does(clouds: Clouds) -> None:
    """One class of two clouds and a covariance in common: the same log-density up to a constant."""
    two = clouds.fit[clouds.labels < 2, :6]
    ours = ClassMixtures(2, "empirical", n_iter=300).fit_features(two, torch.zeros(len(two), dtype=torch.int64))
    theirs = GaussianMixture(
        2, covariance_type="tied", reg_covar=0.0, tol=1e-12, max_iter=2000, n_init=5, random_state=0
    )
    densities = torch.from_numpy(theirs.fit(two.numpy()).score_samples(two.numpy()))
    gap = ours.score(two) - densities
    assert float(gap.max() - gap.min()) < 1e-4


def test_probe_is_scikit_learns(clouds: Clouds) -> None:
    theirs = LogisticRegression(C=3.0, tol=1e-10, max_iter=5000).fit(clouds.fit.numpy(), clouds.labels.numpy())
    ours = fit_probe(clouds.fit, clouds.labels, 5, strength=3.0).logits(clouds.unknown).softmax(1)
    # Two solvers of one convex problem, each as exact as its stopping rule.
    assert np.allclose(ours, theirs.predict_proba(clouds.unknown.numpy()), atol=1e-5)


@pytest.mark.parametrize("digits", [1, 8])
def test_metrics_with_and_without_ties(clouds: Clouds, digits: int) -> None:
    known = Energy(clouds.head).score(clouds.known).round(decimals=digits).numpy()
    unknown = Energy(clouds.head).score(clouds.unknown).round(decimals=digits).numpy()
    ours = all_metrics(known, unknown)
    scores, labels = np.concatenate([known, unknown]), np.repeat([1, 0], [len(known), len(unknown)])
    assert ours.auroc[0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert ours.aupr_in[0] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert ours.aupr_out[0] == pytest.approx(average_precision_score(1 - labels, -scores), abs=1e-12)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert ours.fpr95[0] == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-12)
    preds, target = torch.from_numpy(scores).sigmoid(), torch.from_numpy(labels)
    assert ours.auroc[0] == pytest.approx(float(binary_auroc(preds, target)), abs=1e-6)
    assert ours.aupr_in[0] == pytest.approx(float(binary_average_precision(preds, target)), abs=1e-6)


def test_one_sign_for_all(clouds: Clouds) -> None:
    """Known clouds are known to every score, and all scores rank alike on the whole."""
    made = {name: score.made(clouds.supplies) for name, score in SCORES.items()}
    reference = MaxLogit(clouds.head).score(torch.cat([clouds.known, clouds.unknown]))
    for name, detector in made.items():
        known, unknown = detector.score(clouds.known), detector.score(clouds.unknown)
        assert all_metrics(known.numpy(), unknown.numpy()).auroc[0] > 0.75, name
        assert spearmanr(torch.cat([known, unknown]), reference).statistic > 0.2, name
