"""Frechet distance between two sets of features (FID, with the study's judge)."""

import numpy as np

from lib.metrics._checks import feature_pair


def centred_factor(x):
    """F (at most d rows) with F^T F = (n - 1) times the unbiased covariance of x (n, d)."""
    centred = x - x.mean(axis=0)
    n, d = x.shape
    # Q of X = QR drops out of X^T X, so that R alone carries the covariance.
    return centred if n <= d else np.linalg.qr(centred, mode="r")


def frechet_distance(x, y):
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    d^2 = |mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2}), with unbiased covariances. With
    C_i = F_i^T F_i / (n_i - 1) the last trace is the nuclear norm of F_1 F_2^T over
    sqrt((n_1 - 1)(n_2 - 1)), which is exact for any rank: no d x d root, no ridge. F is the
    centred data, or its triangular factor when there are more rows than features.

    x: (n, d), y: (m, d) features, n, m >= 2; symmetric in both. Returns a float >= 0 in squared
    units of the features. Its bias falls as 1/n, so compare only values of equal n and m.
    Raises StudyError on fewer than two rows, different d, NaN or infinity.

    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6; Dowson and Landau 1982.
    """
    x, y = feature_pair(x, y, minimum=2)
    f1, f2 = centred_factor(x), centred_factor(y)
    dof1, dof2 = len(x) - 1, len(y) - 1
    mean_term = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    traces = np.sum(f1**2) / dof1 + np.sum(f2**2) / dof2
    nuclear_norm = np.linalg.svd(f1 @ f2.T, compute_uv=False).sum()
    # Equal sets leave a rounding error of either sign; a squared distance has none.
    return max(0.0, float(mean_term + traces - 2 * nuclear_norm / np.sqrt(dof1 * dof2)))
