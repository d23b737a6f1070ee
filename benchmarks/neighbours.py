"""Nearest neighbours by IoU: products of bit-packed grids, beside a loop over dense grids"""

from collections.abc import Callable

import numpy as np

from benchmarks import harness
from lib import furniture, metrics, voxel


def shapes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n // 8 queries and n shapes of a database, half chairs and half tables, bool (_, 30^3)."""
    queries = [furniture.shapes(name, n // 16, 1) for name in ("chair", "table")]
    database = [furniture.shapes(name, n // 2, 0) for name in ("chair", "table")]
    return np.concatenate(queries), np.concatenate(database)


def packed(n: int) -> Callable[[], tuple]:
    """`lib.metrics.nearest_by_iou`."""
    queries, database = map(voxel.pack, shapes(n))
    return lambda: metrics.nearest_by_iou(queries, database)


def dense(n: int) -> Callable[[], tuple]:
    """Query by query: intersections and unions with the whole database, voxel by voxel."""
    queries, database = (x.reshape(len(x), -1) for x in shapes(n))

    def nearest() -> tuple[np.ndarray, np.ndarray]:
        index, best = [], []
        for query in queries:
            iou = (database & query).sum(axis=1) / (database | query).sum(axis=1)
            index.append(int(iou.argmax()))
            best.append(iou.max())
        return np.array(index), np.array(best)

    return nearest


def difference(ours: tuple, plain: tuple) -> float:
    """Of the overlaps; another neighbour is a disagreement."""
    return harness.relative(ours[1], plain[1]) + (0 if np.array_equal(ours[0], plain[0]) else 1)


def case(n: int, memory: bool = True) -> harness.Case:
    """n // 8 queries against n shapes."""
    peaks = [harness.peak(__name__, side, n) for side in ("packed", "dense") if memory]
    return harness.timed_case(
        f"{n // 8} queries, {n} shapes of 30^3",
        packed(n),
        dense(n),
        difference=difference,
        tolerance=1e-6,
        memory=tuple(peaks) or None,
        group="shapes, with an eighth as queries",
        size=n,
    )


def cases(full: bool) -> list[harness.Case]:
    """Databases of growing size."""
    return [case(n) for n in ((256, 512, 1024, 2048) if full else (256, 512, 1024))]
