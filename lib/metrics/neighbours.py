"""Nearest neighbours by voxel overlap and by distance of features."""

import numpy as np

from lib.errors import StudyError
from lib.metrics._checks import feature_pair, packed_pair, whole_number

# Pairs with a smaller squared distance, relative to their squared norms, are measured again by
# subtraction. The others keep a relative error near 1e-10, hence the width of a tie.
CANCELLATION = 1e-5
TIE = 1e-9
PART = 256  # rows of the second set; more at once are slower where the first set is small


def first_nearest(distances, axis):
    """Index of the first smallest distance along an axis; rounding does not break ties."""
    least = distances.min(axis=axis, keepdims=True)
    return np.argmax(distances <= least * (1 + TIE), axis=axis)


def unpack_columns(packed, columns):
    """Bits of the chosen byte columns of packed (n, B) as float32 (n, 8 len(columns))."""
    return np.unpackbits(packed[:, columns], axis=1).astype(np.float32)


def iou_matrix(a, b, block=1024):
    """Intersection over union of all pairs of two sets of bit-packed grids.

    a: (n, B), b: (m, B) uint8 from numpy.packbits of flattened grids; block: rows of a that are
    unpacked at once, and of b up to ``PART``, which sets the memory (160 KiB a row for 32^3) and
    never the result. Returns (n, m) float32 in [0, 1]. Two empty grids are equal, so their value
    is 1. Raises StudyError on other dtypes or shapes.

    Intersections are counted by a float32 matrix product, exact up to 2^24 voxels a grid. Bytes
    that are empty throughout either set cannot meet and are left out.
    """
    a, b = packed_pair(a, b)
    block = whole_number(block, "block", 1)
    part = min(block, PART)
    if a.shape[1] > 2**21:
        raise StudyError(f"a: {a.shape[1]} bytes a grid; counts are exact up to {2**21} bytes")
    columns = np.flatnonzero(np.bitwise_or.reduce(a) & np.bitwise_or.reduce(b))
    size_a = np.bitwise_count(a).sum(axis=1, dtype=np.float32)
    size_b = np.bitwise_count(b).sum(axis=1, dtype=np.float32)
    iou = np.empty((len(a), len(b)), dtype=np.float32)
    for i in range(0, len(a), block):
        bits_a = unpack_columns(a[i : i + block], columns)
        for j in range(0, len(b), part):
            both = bits_a @ unpack_columns(b[j : j + part], columns).T
            either = size_a[i : i + block, None] + size_b[None, j : j + part] - both
            empty = either == 0
            iou[i : i + block, j : j + part] = (both + empty) / (either + empty)
    return iou


def nearest_by_iou(queries, database, block=1024):
    """Most overlapping grid of a database for every query, both bit-packed.

    queries: (n, B), database: (m, B) uint8; block: rows handled at once. Returns (index, iou):
    (n,) int64 into the database, the lowest one where several are equally near, and (n,) float32
    in [0, 1]. Raises StudyError on other dtypes or shapes.
    """
    queries, database = packed_pair(queries, database, ("queries", "database"))
    block = whole_number(block, "block", 1)
    index = np.empty(len(queries), dtype=np.int64)
    best = np.empty(len(queries), dtype=np.float32)
    for i in range(0, len(queries), block):
        iou = iou_matrix(queries[i : i + block], database, block)
        index[i : i + block] = iou.argmax(axis=1)
        best[i : i + block] = iou.max(axis=1)
    return index, best


def squared_distances(a, b):
    """Squared Euclidean distances of all pairs: float64 (n, d), (m, d) -> (n, m).

    |a|^2 + |b|^2 - 2 a.b loses the small ones to cancellation, so those are measured again:
    copies come out at exactly 0, which the strict comparisons of `prdc` rely on.
    """
    scale = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None, :]
    squared = scale - 2 * (a @ b.T)
    close = squared <= CANCELLATION * scale
    for i in np.flatnonzero(close.any(axis=1)):
        squared[i, close[i]] = np.sum((a[i] - b[close[i]]) ** 2, axis=1)
    return squared


def feature_distances(a, b, block=1024):
    """Euclidean distances of all pairs of two sets of features.

    a: (n, d), b: (m, d); block: rows of a handled at once, which changes the result by rounding
    only. Returns (n, m) float64, exactly 0 for equal rows. Raises StudyError on different d, NaN
    or infinity.
    """
    a, b = feature_pair(a, b, ("a", "b"))
    block = whole_number(block, "block", 1)
    centre = b.mean(axis=0)  # distances do not change, cancellation does
    a, b = a - centre, b - centre
    parts = [squared_distances(a[i : i + block], b) for i in range(0, len(a), block)]
    return np.sqrt(np.concatenate(parts))


def nearest_by_feature(queries, database, block=1024):
    """Nearest row of a database of features for every query, by Euclidean distance.

    queries: (n, d), database: (m, d); block: queries handled at once. Returns (index, distance):
    (n,) int64 into the database, the lowest one where several are equally near, and (n,) float64.
    Raises StudyError on different d, NaN or infinity.
    """
    queries, database = feature_pair(queries, database, ("queries", "database"))
    block = whole_number(block, "block", 1)
    index = np.empty(len(queries), dtype=np.int64)
    distance = np.empty(len(queries))
    for i in range(0, len(queries), block):
        distances = feature_distances(queries[i : i + block], database, block)
        index[i : i + block] = first_nearest(distances, axis=1)
        distance[i : i + block] = distances.min(axis=1)
    return index, distance
