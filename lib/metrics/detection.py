"""Telling foreign shapes from known ones by a score."""

import numpy as np
from scipy import stats

from lib.metrics._checks import finite_array
from lib.metrics.intervals import Estimate


def detection_auroc(known, foreign):
    """Area under the ROC curve: how often a foreign score lies above a known one, ties half.

    known: (N,), foreign: (M,) scores, higher is more foreign (an energy). Returns Estimate with a
    95 % interval by Hanley and McNeil, cut to [0, 1]. .5 is chance. Raises StudyError.

    Source: Hanley and McNeil 1982, Radiology 143, 29-36.
    """
    known, foreign = finite_array(known, "known", 1), finite_array(foreign, "foreign", 1)
    n, m = len(known), len(foreign)
    ranks = stats.rankdata(np.concatenate([foreign, known]))
    area = float((ranks[:m].sum() - m * (m + 1) / 2) / (n * m))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
    half = stats.norm.ppf(0.975) * np.sqrt(max(variance, 0) / (n * m))
    return Estimate(area, float(max(0, area - half)), float(min(1, area + half)))
