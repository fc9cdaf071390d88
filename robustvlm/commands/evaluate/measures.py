"""Measures of a classifier and of an encoder as pure functions: accuracy, calibration, subgroups, retrieval."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

N_BINS = 15
TOP = 5
"""The right class among so many of the likeliest counts for top-5 accuracy."""
DRAWS = 1000
"""Draws behind the interval of MacroStd, and behind what chance alone gives."""
_ROWS = 1024
# Rows of the matrix of cosines at a time, so that memory does not grow with the product of images and captions.


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each row of logits [N, K] whether its largest entry is the label's: bool [N].

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor([ True, False])
    """
    return logits.argmax(dim=-1) == labels


def places(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the place, from 1, of each label among the logits [N, K] in descending order: int64 [N].

    Where logits are equal the lower class comes first. Top-k accuracy is the share of places up to k.

    Example:
        >>> places(torch.tensor([[2.0, 1.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([2, 1]))
        tensor([3, 1])
    """
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1) + 1


def superclass_correct(predictions: Tensor, labels: Tensor, superclass_of: Tensor) -> Tensor:
    """Return whether prediction and label [N] fall into one superclass: bool [N].

    `superclass_of` [K] maps each class to its superclass at one level of a class tree.

    Example:
        >>> superclass_correct(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([0, 0, 1]))
        tensor([ True, False])
    """
    return superclass_of[predictions] == superclass_of[labels]


def mean_per_class_recall(labels: Sequence[int], right: Sequence[bool]) -> float:
    """Return the mean over classes that have images of the share of their images that are right.

    Every class counts alike, however many images it has: scikit-learn's balanced accuracy, which CLIP_benchmark calls
    mean per-class recall. Raises ValueError without images.

    Example:
        >>> mean_per_class_recall([0, 0, 0, 1], [True, True, True, False])
        0.5
    """
    if not len(labels):
        raise ValueError("the mean per-class recall of no images is not defined")
    known = np.asarray(labels, dtype=np.int64)
    images = np.bincount(known)
    hits = np.bincount(known, weights=np.asarray(right, dtype=np.float64))
    return float((hits[images > 0] / images[images > 0]).mean())


# Calibration; the bins of parts of a data set add up to those of the whole


def calibration_bins(confidences: Tensor, right: Tensor, *, n_bins: int = N_BINS) -> Tensor:
    """Return float64 sums [3, n_bins] over equal-width bins: images, confidence, correct predictions.

    Bin m holds the confidences in ((m-1)/n_bins, m/n_bins], the first one 0 as well. Sums of parts are the whole's.

    Example:
        >>> calibration_bins(torch.tensor([0.5, 0.6, 1.0]), torch.tensor([True, False, True]), n_bins=2)
        tensor([[1.0000, 2.0000],
                [0.5000, 1.6000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    confidences = confidences.double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidences.device)
    index = (torch.bucketize(confidences, edges) - 1).clamp(0, n_bins - 1)
    rows = torch.stack([torch.ones_like(confidences), confidences, right.double()])
    return torch.zeros(3, n_bins, dtype=torch.float64, device=confidences.device).index_add_(1, index, rows)


def calibration_error(bins: Tensor) -> float:
    """Return the expected calibration error of sums from `calibration_bins`: sum |correct - confidence| / images.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3. Raises ValueError when the bins are empty.

    Example:
        >>> round(calibration_error(torch.tensor([[2.0], [1.8], [1.0]])), 6)
        0.4
    """
    images, confidence, right = bins
    if images.sum() == 0:
        raise ValueError("the calibration error of no images is not defined")
    return float((right - confidence).abs().sum() / images.sum())


def expected_calibration_error(confidences: Tensor, right: Tensor, *, n_bins: int = N_BINS) -> float:
    """Return how far confidence is from accuracy, in [0, 1]; confidences float [N] in [0, 1], right bool [N].

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins of equal width unless told otherwise.

    Example:
        >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
        0.4
    """
    return calibration_error(calibration_bins(confidences, right, n_bins=n_bins))


# Subgroups: how unevenly a class is recognised


def macro_std(counts: Mapping[int, NDArray[np.int64]]) -> float:
    """Return the mean over classes of the spread of accuracy over the subgroups of the class, in [0, 0.5].

    std_k = sqrt(sum_g w_kg (a_kg - a_k)^2): w_kg is the share of subgroup g in class k, a_kg its accuracy, and a_k the
    accuracy of the class.

    Source: Chiu et al. 2023, arXiv 2212.08649, subgroups weighted by their images.

    Args:
        counts: for each class, [G, 2]: images of each subgroup, and right ones among them; no subgroup is empty.

    Example:
        >>> macro_std({0: np.array([[5, 5], [5, 0]]), 1: np.array([[5, 3], [5, 3]])})
        0.25
    """
    return float(np.mean([_spread(table[:, 0], table[:, 1]) for table in counts.values()]))


def _spread(images: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the spread of one class; `right` may be [DRAWS, G], and `images` too."""
    images, right = images.astype(np.float64), right.astype(np.float64)
    total = images.sum(axis=-1, keepdims=True)
    accuracy = np.divide(right, images, out=np.zeros(np.broadcast_shapes(right.shape, images.shape)), where=images > 0)
    gap = accuracy - right.sum(axis=-1, keepdims=True) / total
    found: NDArray[np.float64] = np.sqrt((images / total * gap**2).sum(axis=-1))
    return found


def macro_std_draws(
    groups: Mapping[int, NDArray[np.int64]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return MacroStd of bootstrap samples, and of samples in which subgroups differ by chance alone: [draws] each.

    For the first the images of each class are drawn anew with replacement. For the second the right answers of a class
    are dealt out among its images at random: few images a subgroup make a spread out of nothing, and this is how much.

    Args:
        groups: for each class [n, 3], a row for each group of copies, which are drawn and dealt out whole: the place
            of its subgroup among them all (0, 1, ...), its images, the right ones.

    Example:
        >>> alone = [(part, 1, part == 0) for part in (0, 1) for _ in range(50)]
        >>> again, chance = macro_std_draws({0: np.array(alone)}, draws=100)
        >>> bool(again.min() > 0.4 > chance.max())
        True
    """
    generator = np.random.default_rng(seed)
    again, chance = np.zeros(draws), np.zeros(draws)
    for table in groups.values():
        kinds, cells = _kinds(table)
        whole = int(cells.sum())
        drawn = generator.multinomial(whole, cells.ravel() / whole, size=draws).reshape(draws, *cells.shape)
        again += _spread(*_counted(drawn, kinds))
        chance += _spread(*_counted(_dealt(cells, draws, generator), kinds))
    return again / len(groups), chance / len(groups)


def _kinds(groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the kinds of group there are, (images, right) each: [K, 2], and how many a subgroup has of each: [K, G].

    All right and all wrong are listed at every size, which leaves the draws of single images what they are without
    groups.
    """
    found = {(int(images), int(right)) for _, images, right in groups}
    kinds = sorted(found | {(size, right) for size, _ in found for right in (size, 0)}, reverse=True)
    place = {kind: number for number, kind in enumerate(kinds)}
    cells = np.zeros((len(kinds), int(groups[:, 0].max()) + 1), dtype=np.int64)
    for part, images, right in groups:
        cells[place[int(images), int(right)], part] += 1
    return np.array(kinds), cells


def _dealt(cells: NDArray[np.int64], draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return tables [draws, K, G] with the margins of one, as if groups fell into subgroups at random.

    Every subgroup keeps its number of groups, and a group its images and its right answers: where subgroups have
    nothing to do with these, all ways to deal are equally likely.
    """
    found = np.zeros((draws, *cells.shape), dtype=np.int64)
    room = np.broadcast_to(cells.sum(axis=0), (draws, cells.shape[1])).copy()
    for place, number in enumerate(cells.sum(axis=1)[:-1].tolist()):
        if place == 0:
            found[:, 0] = generator.multivariate_hypergeometric(room[0], number, size=draws)
        else:
            left = np.full(draws, number)
            for part in range(cells.shape[1]):
                here, beyond = room[:, part], room[:, part + 1 :].sum(axis=1)
                found[:, place, part] = generator.hypergeometric(here, beyond, left)
                left -= found[:, place, part]
        room -= found[:, place]
    found[:, -1] = room
    return found


def _counted(tables: NDArray[np.int64], kinds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the images and the right ones of each subgroup, [draws, G] both, of numbers of groups [draws, K, G]."""
    images, right = (np.einsum("dkg,k->dg", tables, kinds[:, side]) for side in (0, 1))
    return images, right


# Retrieval


def retrieval_places(images: Tensor, texts: Tensor, image_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place, from 1, of the best of each image's own texts, and that of each text's image: [N], [M].

    Ranked by cosine similarity; a tie with one that does not belong to it counts against. Recall at k is the share of
    places up to k, as CLIP_benchmark and open_clip have it: an image is found if one of its texts is among the first k.

    Args:
        images: unit features [N, D]; texts: unit features [M, D].
        image_of: int64 [M], the image that each text is about; every image has one.

    Example:
        >>> images = torch.eye(3)
        >>> retrieval_places(images, images[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 2]))
        (tensor([1, 2, 4]), tensor([1, 1, 1, 3]))
    """
    of_texts = []
    for start in range(0, len(texts), _ROWS):
        scores, owner = texts[start : start + _ROWS] @ images.T, image_of[start : start + _ROWS]
        own = scores.gather(1, owner[:, None])
        of_texts.append((~(scores < own)).sum(dim=1))  # its own image among them, and what cannot be compared
    of_images = []
    for start in range(0, len(images), _ROWS):
        scores = images[start : start + _ROWS] @ texts.T
        mine = image_of[None, :] == torch.arange(start, start + len(scores))[:, None]
        best = scores.masked_fill(~mine, -torch.inf).amax(dim=1, keepdim=True)
        of_images.append((~(scores < best) & ~mine).sum(dim=1) + 1)
    return torch.cat(of_images), torch.cat(of_texts)
