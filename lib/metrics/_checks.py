"""Checks of arguments, shared by the metrics: each gives the array back or raises StudyError."""

import numpy as np

from lib.errors import StudyError


def finite_array(values, name, ndim):
    """`values` as a float64 array of `ndim` axes, no axis empty, without NaN or infinity."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StudyError(f"{name}: not an array of numbers ({error})") from None
    if array.ndim != ndim or array.size == 0:
        raise StudyError(f"{name}: expected a non-empty array of {ndim} axes, got {array.shape}")
    if not np.isfinite(array).all():
        raise StudyError(f"{name}: NaN or infinity among the values; look at what produced them")
    return array


def feature_pair(x, y, names=("x", "y"), minimum=1):
    """Two float64 feature matrices (n, d) and (m, d) with at least `minimum` rows each."""
    x, y = finite_array(x, names[0], 2), finite_array(y, names[1], 2)
    if x.shape[1] != y.shape[1]:
        raise StudyError(
            f"{names[0]} has {x.shape[1]} features and {names[1]} has {y.shape[1]}: "
            "compute both with the same network"
        )
    for rows, name in ((x, names[0]), (y, names[1])):
        if len(rows) < minimum:
            raise StudyError(f"{name}: {len(rows)} rows, at least {minimum} are needed")
    return x, y


def packed_pair(a, b, names=("a", "b")):
    """Two bit-packed uint8 matrices (n, B) and (m, B), neither empty."""
    for grid, name in ((a, names[0]), (b, names[1])):
        if not isinstance(grid, np.ndarray) or grid.dtype != np.uint8:
            raise StudyError(f"{name}: expected bit-packed uint8 grids, see numpy.packbits")
        if grid.ndim != 2 or grid.size == 0:
            raise StudyError(f"{name}: expected a non-empty array (N, bytes), got {grid.shape}")
    if a.shape[1] != b.shape[1]:
        raise StudyError(
            f"{names[0]} has {a.shape[1]} bytes a grid and {names[1]} has {b.shape[1]}: "
            "bring both to one resolution"
        )
    return a, b


def fraction_array(values, name, ndim=1):
    """`finite_array` whose values all lie in [0, 1]."""
    array = finite_array(values, name, ndim)
    if array.min() < 0 or array.max() > 1:
        raise StudyError(f"{name}: values must lie in [0, 1], got {array.min()} to {array.max()}")
    return array


def whole_number(value, name, low, high=None):
    """`value` as an int in [low, high]; `high=None` leaves it open."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise StudyError(f"{name}: expected a whole number, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise StudyError(f"{name}: {value} is out of range, it must be {allowed}")
    return int(value)
