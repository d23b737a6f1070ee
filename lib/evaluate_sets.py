"""Rows of the set-metric and memorisation tables: sets of shapes compared as sets."""

from collections.abc import Iterable

import numpy as np

from lib import metrics, rng
from lib.evaluate import Gallery
from lib.metrics import Estimate

REFERENCE = "test"


def set_metric_rows(gallery: Gallery) -> Iterable[dict]:
    """Rows of table ``set_metrics``: every row against the test shapes, at equal n.

    Precision, recall, density and coverage in the judge's features; minimum matching distance,
    coverage and 1-NN accuracy by 1 - IoU, which sees pose where the judge does not. Cells that
    cannot have the common n stay empty; so does the reference against itself.
    """
    settings = gallery.profile.evaluation
    for row, cells in gallery.seen.items():
        for category in cells:
            if row == f"real {REFERENCE}":
                continue
            pools = _pools(gallery, row, category)
            if min(len(p) for p in pools["packed"]) < settings.n_equal:
                continue
            key = ("set_metrics", row, category)
            draws = _draws(pools, settings, rng.numpy_generator("evaluate", *key))
            whole = max(len(p) for p in pools["packed"]) == settings.n_equal
            for metric in draws[0]:
                yield dict(
                    row=row,
                    category=category,
                    metric=metric,
                    estimate=Estimate.of_draws([d[metric] for d in draws], whole),
                    headline=int(metric in ("coverage", "1-nna iou")),
                    reference=REFERENCE,
                    n_samples=settings.n_equal,
                    n_reference=settings.n_equal,
                    note="",
                )


def _pools(gallery: Gallery, row: str, category: str) -> dict[str, tuple]:
    """(real, generated) features and packed grids of a cell."""
    real, generated = gallery.seen[f"real {REFERENCE}"][category], gallery.seen[row][category]
    packed = gallery.packed
    return {
        "features": (real.features, generated.features),
        "packed": (packed[f"real {REFERENCE}"][category], packed[row][category]),
    }


def _draws(pools: dict, settings, generator: np.random.Generator) -> list[dict[str, float]]:
    """All set metrics for each draw of n real and n generated shapes without replacement."""
    (real, generated), (a, b) = pools["features"], pools["packed"]
    across = 1 - metrics.iou_matrix(a, b)
    within_real, within_generated = 1 - metrics.iou_matrix(a, a), 1 - metrics.iou_matrix(b, b)
    out = []
    for _ in range(settings.n_draws):
        i = generator.choice(len(a), settings.n_equal, replace=False)
        j = generator.choice(len(b), settings.n_equal, replace=False)
        found = metrics.precision_recall_density_coverage(real[i], generated[j], settings.k)
        d = across[np.ix_(i, j)]
        found["mmd iou"] = metrics.minimum_matching_distance(d)
        found["cov iou"] = metrics.coverage(d)
        found["1-nna iou"] = metrics.one_nearest_neighbour_accuracy(
            within_real[np.ix_(i, i)], within_generated[np.ix_(j, j)], d
        )
        out.append(found)
    return out


def memorisation_rows(gallery: Gallery) -> Iterable[dict]:
    """Rows of table ``memorisation``: how near generated shapes come to the training shapes.

    The row ``real test`` is the level to expect of fresh shapes; ``auc`` is .5 there.
    """
    packed = gallery.packed
    for row, cells in packed.items():
        if row == "real train":
            continue
        for category, shapes in cells.items():
            train = packed["real train"][category]
            nearest = metrics.nearest_by_iou(shapes, train)[1]
            heldout = metrics.nearest_by_iou(packed["real test"][category], train)[1]
            found = metrics.memorisation(nearest, heldout)
            common = dict(row=row, category=category, reference="train", n_samples=len(shapes))
            common |= dict(n_reference=len(train), note="")
            for share in ("share_95", "share_90"):
                count = round(found[share] * len(shapes))
                estimate = metrics.wilson_interval(count, len(shapes))
                name = f"share at IoU .{share[-2:]} of a training shape"
                yield common | dict(
                    metric=name, estimate=estimate, headline=int(share[-2:] == "95")
                )
            alone = Estimate(found["auc"], float("nan"), float("nan"))
            yield common | dict(metric="auc against real test", estimate=alone, headline=0)
