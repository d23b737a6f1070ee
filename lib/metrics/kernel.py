"""Kernel distances of two sets: of features (KID, with the study's judge), and of voxel grids."""

import numpy as np

from lib.errors import StudyError
from lib.metrics._checks import feature_pair, packed_pair
from lib.metrics.neighbours import iou_matrix


def polynomial_kernel(x, y):
    """k(x, y) = (x.y / d + 1)^3 for all pairs of rows: (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(x, y):
    """Unbiased squared maximum mean discrepancy with the cubic polynomial kernel.

    MMD^2_u = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j).

    x: (n, d), y: (m, d) features, n, m >= 2; symmetric in both. Returns a float of expectation
    zero when both come from one distribution, so single values may be negative; not multiplied
    by 1000. All rows are used at once, no subsets are drawn. Raises StudyError on fewer than two
    rows, different d, NaN or infinity.

    Source: Binkowski et al. 2018 (arXiv:1801.01401); Gretton et al. 2012 (Journal of Machine
    Learning Research 13), lemma 6.
    """
    x, y = feature_pair(x, y, minimum=2)
    return _mmd2(polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y))


def overlap_distance(a, b):
    """Unbiased squared maximum mean discrepancy of two sets of grids; the kernel is their overlap.

    a: (n, B), b: (m, B) uint8, bit-packed grids, n, m >= 2; symmetric in both. Intersection over
    union is a positive definite kernel, and needs no features: what selects a model by it does
    not know the judge. Returns a float in [-2, 2] of expectation zero when both come from one
    distribution. Raises StudyError on fewer than two grids, other dtypes or shapes.

    Source: Gretton et al. 2012, lemma 6; Bouchard et al. 2013 (International Journal of
    Approximate Reasoning 54) for the kernel.
    """
    a, b = packed_pair(a, b)
    if min(len(a), len(b)) < 2:
        raise StudyError(f"a, b: two grids or more each, not {len(a)} and {len(b)}")
    return _mmd2(*(iou_matrix(x, y).astype(np.float64) for x, y in ((a, a), (b, b), (a, b))))


def _mmd2(kxx, kyy, kxy):
    """MMD^2_u of kernel matrices (n, n), (m, m), (n, m)."""
    n, m = kxy.shape
    within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
    within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * kxy.mean())
