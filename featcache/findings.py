"""What is wrong with a data set, from arrays: duplicates, leaks, wrong labels, outliers, classes that overlap.

Features, labels, splits and out-of-fold probabilities in, rows out. Knows no files, no names and no heads.

================  ====================================================================================================
directions        features centred and of length 1: their products are the similarities below
neighbours        the nearest of every image, and which images are linked to which, in one pass over blocks
groups            images that are the same, or nearly: by content, by similarity, by both
folds             in which a group is never torn apart, so that no image is judged by its own twin
labels            ranked by cleanlab's label quality, the number of wrong ones estimated by confident learning
================  ====================================================================================================

References
----------
.. [1] C. G. Northcutt, L. Jiang and I. L. Chuang, Confident learning: estimating uncertainty in dataset labels, Journal
   of Artificial Intelligence Research 70 (2021)
.. [2] J. Kuan and J. Mueller, Model-agnostic label quality scoring to detect real-world label errors, ICML DataPerf
   Workshop 2022
.. [3] J. Kuan and J. Mueller, Back to the basics: revisiting out-of-distribution detection baselines, ICML Workshop on
   Principles of Distribution Shift 2022
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import DatasetError
from featcache.extras import import_extra
from featcache.metrics import confusion_matrix
from featcache.progress import SILENT, Progress

Rows = NDArray[np.int64]
BLOCK = 1 << 24  # similarities at a time: 64 MB
NOWHERE = 1e-5  # of its feature's length: what single precision leaves of an image that lies at the mean
NEVER = -2.0  # less than any similarity
ALWAYS = -1  # the fold of rows that every fit sees and none judges
SCORE = "self_confidence"  # of cleanlab's three the best at random errors, see docs/audit.md


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The images that are most like each image.

    Attributes
    ----------
    rows
        (N, k) int64, the nearest first; k is less than was asked for where there are fewer other images.
    similarity
        (N, k) float32, the cosine of the angle between them as seen from the mean, -1 to 1; NaN where `known` is not.
    known
        (N,) bool: whether an image's features point anywhere. Those that do not are nobody's neighbours.
    groups
        (N,) int64, a number that images share where links of at least the threshold lead from one to the other.
    """

    rows: Rows
    similarity: NDArray[np.float32]
    known: NDArray[np.bool_]
    groups: Rows


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that are the same, or nearly.

    Attributes
    ----------
    rows
        Two or more, ascending.
    similarity
        Every one of them has another one that is at least so similar; None where nobody knows.
    exact
        Whether they have one content.
    contradiction
        Whether they have several labels.
    leak
        Whether they are in several splits: of near-duplicates any two, of exact ones the very same content.
    """

    rows: tuple[int, ...]
    similarity: float | None
    exact: bool
    contradiction: bool
    leak: bool


@dataclass(frozen=True, kw_only=True)
class LabelRanking:
    """How likely each label is right.

    Attributes
    ----------
    order
        (N,) int64, rows, the one most worth a look first; those that were not judged last.
    quality
        (N,) float64, 0 to 1, the probability of the given label by a head that did not learn from the image or its
        twins; NaN where it was not judged.
    suggested
        (N,) int64, the most probable class, -1 where it was not judged.
    issues
        (N,) bool, the labels that are called wrong.
    """

    order: Rows
    quality: NDArray[np.float64]
    suggested: Rows
    issues: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two classes that are taken for one another: how many images of each are predicted as the other."""

    first: int
    second: int
    first_as_second: int
    second_as_first: int

    @property
    def count(self) -> int:
        """Images of both."""
        return self.first_as_second + self.second_as_first


def check_finite(features: NDArray[np.float32], paths: Sequence[str]) -> None:
    """Raise a DatasetError that names the first image whose features (N, D) are no finite numbers."""
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DatasetError(f"the features of {paths[row]} are not finite numbers; extract or import them again")


def make_directions(features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where images lie as seen from the mean of all.

    Centred, as features share much that says nothing: of drawn digits nine in ten images have another one at a cosine
    above 0.9 as they are, and one in a hundred as seen from the mean.

    Parameters
    ----------
    features
        (N, D), finite.

    Returns
    -------
    directions
        (N, D) float32, rows of length 1, or of zeros where there is none.
    known
        (N,) bool: which are not zeros: an image whose features are all 0, or lie at the mean, says nothing of itself.
    """
    largest = float(np.abs(features).max(initial=0.0))
    scaled = features / np.float32(largest or 1.0)  # squares of large numbers would overflow
    lengths = np.linalg.norm(scaled, axis=1)
    centred = np.subtract(scaled, scaled.mean(axis=0, dtype=np.float64).astype(np.float32), out=scaled)
    distances = np.linalg.norm(centred, axis=1)
    known = (distances > NOWHERE * np.maximum(lengths, lengths.mean())) & (lengths > 0)
    centred[~known] = 0
    centred /= np.where(known, distances, 1)[:, None]
    return centred, known


def find_neighbours(
    features: NDArray[np.float32], n_neighbours: int, threshold: float, progress: Progress = SILENT
) -> Neighbours:
    """Compare every image with every other one, some at a time.

    N^2 D multiplications and additions, N (D + k) numbers and a block of similarities in memory, never all of them.

    Parameters
    ----------
    features
        (N, D), finite.
    n_neighbours
        k.
    threshold
        Similarity from which on two images are linked.
    progress
        Told of the blocks.
    """
    directions, known = make_directions(features)
    everything, n = torch.from_numpy(directions), len(directions)
    k = max(min(n_neighbours, int(known.sum()) - 1), 0)
    rows, similarity = np.zeros((n, k), np.int64), np.full((n, k), np.nan, np.float32)
    groups = np.arange(n)
    nowhere = torch.from_numpy(~known)
    starts = range(0, n, max(1, BLOCK // n))
    for start in progress.track(starts, total=len(starts), what="comparing images", unit="block"):
        block = everything[start : start + starts.step] @ everything.T
        block[:, nowhere] = NEVER
        block[nowhere[start : start + starts.step]] = NEVER
        block.diagonal(start).fill_(NEVER)
        top = block.topk(k, dim=1)
        rows[start : start + len(block)], similarity[start : start + len(block)] = top.indices, top.values
        linked = torch.nonzero(block >= threshold).numpy()
        if len(linked):
            groups = join_linked(groups, start + linked[:, 0], linked[:, 1])
    similarity[~known] = np.nan
    return Neighbours(rows=rows, similarity=np.minimum(similarity, 1), known=known, groups=groups)


def join_linked(groups: Rows, first: Rows, second: Rows) -> Rows:
    """Groups (N,) of which those of the rows `first` (L,) and `second` (L,) have become one, pair by pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(groups)
    links = coo_matrix((np.ones(len(first), bool), (groups[first], groups[second])), shape=(n, n))
    components: Rows = connected_components(links, directed=False)[1].astype(np.int64)
    return components[groups]


def join_contents(groups: Rows, contents: Rows) -> Rows:
    """Groups (N,) of which those that hold an image of the same content (N,) have become one."""
    _, first, which = np.unique(contents, return_index=True, return_inverse=True)
    return join_linked(groups, np.arange(len(groups)), first[which.ravel()])


def number_contents(digests: Sequence[str]) -> Rows:
    """Digests (N,) as numbers: equal where they are equal."""
    numbers: Rows = np.unique(np.array(digests), return_inverse=True)[1].ravel().astype(np.int64)
    return numbers


def list_members(groups: Rows) -> list[Rows]:
    """The rows of every group (N,) of at least two, ascending."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))


def find_exact(contents: Rows, labels: Rows, splits: Rows) -> list[Group]:
    """Images of the same content (N,), leaks first, then contradictions.

    Parameters
    ----------
    contents
        (N,), equal where the content is.
    labels
        (N,), classes.
    splits
        (N,), the number of the split that each image is in.
    """
    found = [
        Group(
            rows=tuple(rows.tolist()),
            similarity=1.0,
            exact=True,
            contradiction=len(set(labels[rows].tolist())) > 1,
            leak=len(set(splits[rows].tolist())) > 1,
        )
        for rows in list_members(contents)
    ]
    return sorted(found, key=lambda group: (not group.leak, not group.contradiction))


def find_near(neighbours: Neighbours, contents: Rows, labels: Rows, splits: Rows) -> list[Group]:
    """Images of different contents that are linked, those that leak first, then the most similar.

    Parameters as of `find_exact`. Exact duplicates of a member are in its group.
    """
    found = []
    for rows in list_members(join_contents(neighbours.groups, contents)):
        if len(set(contents[rows].tolist())) == 1:
            continue
        nearest = neighbours.similarity[rows, 0]
        found.append(
            Group(
                rows=tuple(rows.tolist()),
                similarity=float(np.nanmin(nearest)),
                exact=False,
                contradiction=len(set(labels[rows].tolist())) > 1,
                leak=len(set(splits[rows].tolist())) > 1,
            )
        )
    return sorted(found, key=lambda group: (not group.leak, -(group.similarity or 0)))


def make_group_folds(labels: Rows, groups: Rows, n_folds: int, seed: int) -> Rows:
    """Folds (N,) that tear no group apart, with the classes spread over them.

    Twins in two folds would judge each other: a wrong label that was copied along with its image would look right.

    Parameters
    ----------
    labels
        (N,), every class of 0..C-1 present.
    groups
        (N,), see `Neighbours`.
    n_folds
        At most so many.
    seed
        Shuffles the groups.

    Returns
    -------
    (N,) int64. `ALWAYS` where the class has no images outside the group, and for that group: no fit could learn it
    without them, so that they cannot be judged.
    """
    _, first, which = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]
    of_group = np.empty(len(first), np.int64)
    of_group[order] = np.arange(len(first)) % n_folds
    folds: Rows = of_group[which.ravel()]
    held = np.zeros((int(labels.max()) + 1, n_folds), bool)
    held[labels, folds] = True
    lonely = held.sum(axis=1) == 1
    folds[np.isin(groups, groups[lonely[labels]])] = ALWAYS
    used = np.unique(folds[folds != ALWAYS])
    return np.where(folds == ALWAYS, ALWAYS, np.searchsorted(used, folds))


def rank_labels(labels: Rows, probabilities: NDArray[np.float64], judged: NDArray[np.bool_]) -> LabelRanking:
    """Rank labels by cleanlab's quality score [2]_, and call as many wrong as confident learning estimates [1]_.

    Parameters
    ----------
    labels
        (N,).
    probabilities
        (N, C), each row by a head that did not learn from it.
    judged
        (N,), where those say something.

    Raises
    ------
    MissingExtraError
        If cleanlab is not installed.
    """
    rank = import_extra("cleanlab.rank", extra="audit", what="ranking labels needs")
    count = import_extra("cleanlab.count", extra="audit", what="ranking labels needs")
    quality, suggested = np.full(len(labels), np.nan), np.full(len(labels), -1)
    issues = np.zeros(len(labels), bool)
    rows = np.flatnonzero(judged)
    if len(rows):
        own, given = probabilities[rows], labels[rows]
        quality[rows] = rank.get_label_quality_scores(given, own, method=SCORE)
        suggested[rows] = own.argmax(axis=1)
    order = np.argsort(quality, kind="stable")  # NaN last
    if len(np.unique(labels[rows])) > 1:
        issues[order[: count.num_label_issues(labels[rows], probabilities[rows])]] = True
        issues &= suggested != labels
    return LabelRanking(order=order, quality=quality, suggested=suggested, issues=issues)


def rank_outliers(neighbours: Neighbours) -> tuple[Rows, NDArray[np.float64]]:
    """Images far from all others [3]_.

    Returns
    -------
    order
        Rows, the farthest first; those whose features point nowhere are left out.
    distance
        (N,) float64, 1 minus the mean similarity of the nearest neighbours: 0 among twins, about 1 where nothing is
        like the image; NaN where it is not known.
    """
    if not neighbours.similarity.shape[1]:
        return np.zeros(0, np.int64), np.full(len(neighbours.known), np.nan)
    distance = 1 - neighbours.similarity.astype(np.float64).mean(axis=1)
    order = np.argsort(-distance, kind="stable")
    return order[neighbours.known[order]], distance


def find_overlaps(labels: Rows, predicted: Rows, n_classes: int) -> list[Overlap]:
    """Pairs of classes that are taken for one another, those with the most such images first.

    Parameters
    ----------
    labels, predicted
        (n,), of images that the fit did not see.
    n_classes
        C.
    """
    counts = confusion_matrix(labels, predicted, n_classes)
    found = [
        Overlap(first=a, second=b, first_as_second=int(counts[a, b]), second_as_first=int(counts[b, a]))
        for a, b in zip(*np.nonzero(np.triu(counts + counts.T, 1)), strict=True)
    ]
    return sorted(found, key=lambda pair: -pair.count)
