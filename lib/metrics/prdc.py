"""Precision, recall, density and coverage of generated features."""

import numpy as np

from lib.metrics._checks import feature_pair, whole_number
from lib.metrics.neighbours import TIE, feature_distances


def neighbour_radii(x, k):
    """Distance of every row of x (n, d) to its k-th nearest other row: (n,)."""
    distances = feature_distances(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def precision_recall_density_coverage(real, generated, k):
    """Share of each set that lies within the other's nearest-neighbour balls.

    Convention of the `prdc` package: Euclidean distance; a ball reaches to the k-th nearest row
    of its own set, the row itself not counted; a point is inside if its distance is strictly
    (`<`) below the radius. Other implementations use `<=`, which differs when rows repeat. Here
    a distance within 1e-9 of the radius equals it: a copy of the k-th neighbour is outside.

    real: (n, d), generated: (m, d) features, n, m > k >= 1. Returns a dict of floats:
      precision  share of generated rows inside at least one real ball, [0, 1]
      recall     share of real rows inside at least one generated ball, [0, 1]
      density    mean number of real balls round a generated row, over k, [0, n / k]
      coverage   share of real balls that hold at least one generated row, [0, 1]
    None is symmetric: swapping the sets swaps precision with recall. Raises StudyError on too few
    rows, different d, NaN or infinity.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2; Naeem et al. 2020
    (arXiv:2002.09797), section 3.
    """
    k = whole_number(k, "k", 1)
    real, generated = feature_pair(real, generated, ("real", "generated"), minimum=k + 1)
    distances = feature_distances(real, generated)  # (n, m)
    strictly = 1 - TIE
    in_real_ball = distances < strictly * neighbour_radii(real, k)[:, None]
    in_generated_ball = distances < strictly * neighbour_radii(generated, k)[None, :]
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float(in_generated_ball.any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / k),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }
