"""Kernel distance between two sets of features (KID, with the study's judge)."""

from lib.metrics._checks import feature_pair


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
    n, m = len(x), len(y)
    kxx, kyy, kxy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
    within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * kxy.mean())
