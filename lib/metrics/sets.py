"""Measures of a whole generated set against a real one, from matrices of distances."""

import numpy as np

from lib.errors import StudyError
from lib.metrics._checks import finite_array, packed_pair
from lib.metrics.neighbours import TIE, first_nearest, iou_matrix


def distance_matrix(distances, name, shape=None):
    """`distances` as a float64 matrix of values >= 0, of the given shape if there is one."""
    d = finite_array(distances, name, 2)
    if shape is not None and d.shape != shape:
        raise StudyError(f"{name}: expected shape {shape} (rows, columns), got {d.shape}")
    if d.min() < 0:
        raise StudyError(f"{name}: negative distance {d.min()}; pass distances, not similarities")
    return d


def minimum_matching_distance(distances_real_generated):
    """Mean over real shapes of the distance to the nearest generated shape (MMD).

    distances_real_generated: (n, m), rows real, columns generated, values >= 0. Returns a float
    in the units of the distance; lower is better. It depends on m: compare equal counts only.
    Raises StudyError on NaN, infinity or negative values.

    Source: Achlioptas et al. 2018 (arXiv:1707.02392); not the kernel discrepancy.
    """
    d = distance_matrix(distances_real_generated, "distances_real_generated")
    return float(d.min(axis=1).mean())


def coverage(distances_real_generated):
    """Share of real shapes that are the nearest real shape of some generated shape (COV).

    distances_real_generated: (n, m), rows real, columns generated, values >= 0. Returns a float
    in [1 / n, min(1, m / n)]. Among equally near real shapes the first row is taken, so that a
    shape at one distance from all covers one of them. Raises StudyError on NaN, infinity or
    negative values.

    Source: Achlioptas et al. 2018 (arXiv:1707.02392); not the coverage of `prdc`.
    """
    d = distance_matrix(distances_real_generated, "distances_real_generated")
    return len(np.unique(first_nearest(d, axis=0))) / d.shape[0]


def same_set_votes(within, across):
    """For each row, 1 if its nearest neighbour is of its own set, 0 if not, 1/2 at a tie."""
    own = within.copy()
    np.fill_diagonal(own, np.inf)
    own, other = own.min(axis=1), across.min(axis=1)
    tie = np.isclose(own, other, rtol=TIE, atol=0)
    return np.where(tie, 0.5, own < other)


def one_nearest_neighbour_accuracy(d_real_real, d_generated_generated, d_real_generated):
    """Leave-one-out accuracy of a 1-NN classifier that tells real from generated (1-NNA).

    d_real_real: (n, n); d_generated_generated: (m, m); d_real_generated: (n, m), rows real,
    columns generated; values >= 0, n, m >= 2. Returns a float in [0, 1]: .5 if the sets cannot be
    told apart, 1 if they are separated, below .5 if generated shapes copy the real ones one by
    one. Meant for n = m. A tie between both sets counts one half, which makes the value the same
    for any order of the shapes. Raises StudyError on shapes that do not fit, NaN, infinity or
    negative values.

    Source: Lopez-Paz and Oquab 2017 (arXiv:1610.06545); Yang et al. 2019 (PointFlow,
    arXiv:1906.12320).
    """
    across = distance_matrix(d_real_generated, "d_real_generated")
    n, m = across.shape
    if min(n, m) < 2:
        raise StudyError(f"d_real_generated: {n} real and {m} generated shapes, 2 of each needed")
    real = distance_matrix(d_real_real, "d_real_real", (n, n))
    generated = distance_matrix(d_generated_generated, "d_generated_generated", (m, m))
    votes = np.concatenate([same_set_votes(real, across), same_set_votes(generated, across.T)])
    return float(votes.mean())


def pairwise_diversity(packed):
    """Mean of 1 - IoU over all pairs of different shapes of one set.

    packed: (N, B) uint8 bit-packed grids, N >= 2. Returns a float in [0, 1]; 0 means that all
    shapes are the same. Raises StudyError on other dtypes or shapes.
    """
    packed_pair(packed, packed, ("packed", "packed"))
    n = len(packed)
    if n < 2:
        raise StudyError(f"packed: {n} grid, at least 2 are needed to form a pair")
    iou = iou_matrix(packed, packed).astype(np.float64)
    return float(1 - (iou.sum() - iou.trace()) / (n * (n - 1)))
