"""Frechet distance: nuclear norm of thin factors, beside roots of dense covariance products"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from benchmarks import harness
from lib import metrics, rng

# Dense products have d - n eigenvalues that should be zero; the roots of their rounding errors are
# what differs. Without them the two agree to 1e-13 (n = 200, d = 1024).
TOLERANCE, TOLERANCE_WIDE = 1e-6, 1e-5
WIDTH = 4096  # features of the published judge


def features(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets (n, d) of correlated features, non-negative as behind a ReLU, of different means."""
    draw = rng.numpy_generator(0, "benchmark", "features", n, d)
    mixing = draw.standard_normal((128, d)) * np.linspace(2, 0.1, 128)[:, None]
    sets = [draw.standard_normal((n, 128)) @ mixing + draw.standard_normal((n, d)) for _ in "xy"]
    return np.maximum(sets[0], 0), np.maximum(sets[1] * 1.1 + 0.5, 0)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and dense unbiased covariance."""
    return x.mean(axis=0), np.cov(x, rowvar=False)


def ours(n: int, d: int) -> Callable[[], float]:
    """`lib.metrics.frechet_distance`."""
    x, y = features(n, d)
    return lambda: metrics.frechet_distance(x, y)


def square_root(n: int, d: int) -> Callable[[], float]:
    """The formula of most code bases: `scipy.linalg.sqrtm` of the product of the covariances."""
    x, y = features(n, d)

    def distance() -> float:
        (m1, c1), (m2, c2) = moments(x), moments(y)
        root = scipy.linalg.sqrtm(c1 @ c2).real
        return float(np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root))

    return distance


def eigenvalues(n: int, d: int) -> Callable[[], float]:
    """The formula of torchmetrics: eigenvalues of the product, in double precision."""
    x, y = features(n, d)

    def distance() -> float:
        parts = [torch.from_numpy(part) for z in (x, y) for part in moments(z)]
        return float(_compute_fid(*parts))

    return distance


def case(plain: Callable, n: int, d: int, memory: bool = True) -> harness.Case:
    """Ours against one of the dense formulas."""
    names = {square_root: "sqrtm of scipy", eigenvalues: "eigenvalues, as torchmetrics"}
    functions = ("ours", plain.__name__)
    peaks = [harness.peak(__name__, function, n, d) for function in functions if memory]
    return harness.timed_case(
        f"n = {n}, d = {d}; plain: {names[plain]}",
        ours(n, d),
        plain(n, d),
        tolerance=TOLERANCE_WIDE if d == WIDTH else TOLERANCE,
        repeats=3,
        memory=tuple(peaks) or None,
        group=f"n at d = {d}, {names[plain]}",
        size=n,
    )


def cases(full: bool) -> list[harness.Case]:
    """Dense roots take minutes at 4096 features, so that only full goes there."""
    sizes = (200, 500, 1000)
    few = [case(plain, n, 1024) for plain in (square_root, eigenvalues) for n in sizes]
    many = [case(plain, 1000, WIDTH) for plain in (square_root, eigenvalues) if full]
    return few + many
