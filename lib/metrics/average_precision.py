"""Average precision of voxel predictions, and its highest value over rigid grid alignments."""

import itertools
from typing import NamedTuple

import numpy as np

from lib.errors import StudyError
from lib.metrics._checks import fraction_array

N_LEVELS = 48  # ranks are bounded together in so many bins; only speed depends on it
CHUNK = 16  # alignments that are evaluated at once; only speed depends on it


def average_precision(truth, scores):
    """Average precision of voxels, sum over thresholds of (R_n - R_n-1) P_n, in [0, 1].

    truth: bool (V,) or any shape, scores: the same shape, in [0, 1]; equal scores share a
    threshold. The measure of Girdhar et al. 2016, who call scikit-learn's. Raises StudyError for
    a truth without occupied voxels, other shapes and scores outside [0, 1].
    """
    truth, scores = _checked(truth, scores)
    return float(_average_precision(truth.reshape(1, -1), scores.reshape(1, -1))[0])


def _checked(truth, scores):
    truth = np.asarray(truth)
    if truth.dtype != bool or not truth.any():
        raise StudyError("average precision needs a bool truth with at least one occupied voxel")
    scores = fraction_array(scores, "scores", truth.ndim)
    if scores.shape != truth.shape:
        raise StudyError(f"truth has shape {truth.shape} and scores {scores.shape}")
    return truth, scores


def _average_precision(truth, scores):
    """Average precision (N,) of rows: truth (N, V) bool and scores (N, V)."""
    order = np.argsort(-scores, axis=1)
    ranked = np.take_along_axis(scores, order, 1)
    hits = np.take_along_axis(truth, order, 1).cumsum(1)
    last = np.ones(ranked.shape, bool)  # of the voxels that share a score
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    out = np.empty(len(truth))
    for k, ends in enumerate(last):
        found = hits[k, ends]
        precision = found / (np.flatnonzero(ends) + 1)
        out[k] = (np.diff(found, prepend=0) * precision).sum() / found[-1]
    return out


def symmetries(grid):
    """The 48 axis permutations and flips of a cube (D, D, D), as an array (48, D, D, D)."""
    return np.stack(
        [
            np.flip(grid.transpose(axes), [k for k in range(3) if flips[k]])
            for axes in itertools.permutations(range(3))
            for flips in itertools.product((False, True), repeat=3)
        ]
    )


def shifted(grid, shift):
    """A cube moved by whole voxels; what leaves it is lost, what enters is 0."""
    out = np.zeros_like(grid)
    side = len(grid)
    to = tuple(slice(max(s, 0), side + min(s, 0)) for s in shift)
    out[to] = grid[tuple(slice(max(-s, 0), side + min(-s, 0)) for s in shift)]
    return out


class Alignments(NamedTuple):
    """A truth under all symmetries, without repeats: ``poses`` (P, D, D, D) and the shifts."""

    poses: np.ndarray
    shifts: list[tuple[int, int, int]]


def alignments(truth, reach):
    """The symmetries of a bool truth (D, D, D), and all shifts by up to ``reach`` voxels."""
    steps = range(-reach, reach + 1)
    return Alignments(
        np.unique(symmetries(truth), axis=0), list(itertools.product(steps, repeat=3))
    )


def aligned_average_precision(truth, scores, reach):
    """The highest average precision of a prediction over its poses on the grid.

    truth: bool (D, D, D). scores: (D, D, D) in [0, 1]. All 48 axis permutations and flips, each
    moved by up to ``reach`` voxels along every axis, with 0 entering: an oracle, which chooses by
    the truth. Exact: pairs are taken in order of an upper bound, until it falls below the best.
    """
    truth, scores = _checked(truth, scores)
    return best_alignment(alignments(truth, reach), scores)[0]


def best_alignment(possible, scores):
    """The highest average precision and (pose, shift) that reaches it, for scores (D, D, D)."""
    bounds = _upper_bounds(possible, scores)
    order = np.argsort(-bounds, axis=None, kind="stable")
    flat = possible.poses.reshape(len(possible.poses), -1)
    best, place = -1.0, (0, 0)
    for first in range(0, len(order), CHUNK):
        pose, shift = np.unravel_index(order[first : first + CHUNK], bounds.shape)
        open_ = bounds[pose, shift] > best
        if not open_.any():
            break
        pose, shift = pose[open_], shift[open_]
        moved = np.stack([shifted(scores, possible.shifts[s]).ravel() for s in shift])
        found = _average_precision(flat[pose], moved)
        k = int(found.argmax())
        if found[k] > best:
            best, place = float(found[k]), (int(pose[k]), int(shift[k]))
    return best, place


def _upper_bounds(possible, scores):
    """Upper bounds (P, S) of the average precision of every pose and shift.

    Voxels are counted in bins of like rank. Of k occupied ones in a bin that follows n voxels, h of
    them occupied, none has a precision above (h + k) / (n + k): all before the others, none later.
    Where a bin of m voxels holds one score only, all have (h + k) / (n + m).
    """
    side = scores.shape[0]
    level, single = _levels(scores.ravel())
    level, last = level.reshape(scores.shape), len(single) - 1
    reach = max(max(s) for s in possible.shifts)
    # Zeros that enter lie in the last bin, as the lowest scores do.
    around = np.pad(level, reach, constant_values=last).ravel()
    steps = (side + 2 * reach) ** np.array([2, 1, 0])
    start = reach * steps.sum() - np.array(possible.shifts) @ steps  # of the moved grid, (S,)

    def count(cells):
        """How many of the cells (N, 3) fall into every bin after each shift, (S, L)."""
        found = around[start[:, None] + cells @ steps]
        found = found + (last + 1) * np.arange(len(start))[:, None]
        return np.bincount(found.ravel(), minlength=len(start) * (last + 1)).reshape(-1, last + 1)

    seen = count(np.argwhere(np.ones(scores.shape, bool)))
    before = seen.cumsum(1) - seen
    out = np.empty((len(possible.poses), len(start)))
    for k, pose in enumerate(possible.poses):
        hits = count(np.argwhere(pose))
        bound = hits * hits.cumsum(1) / np.maximum(before + np.where(single, seen, hits), 1)
        out[k] = bound.sum(1) / hits[0].sum()
    return out * (1 + 1e-9)  # rounding must not close a pair too early


def _levels(scores):
    """Bins (V,) of like rank, the highest scores in bin 0, finer at the top; ties share a bin.

    Also which bins (L,) hold one score only; zeros that enter count with the last.
    """
    values, inverse, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    start = counts.cumsum() - counts  # rank at which each score begins
    edges = np.unique(np.geomspace(1, len(scores), N_LEVELS).astype(int))
    level = np.unique(np.searchsorted(edges, start, "right"), return_inverse=True)[1]
    n_scores = np.bincount(level)
    n_scores[-1] += values[-1] != 0
    return level[inverse], n_scores == 1
