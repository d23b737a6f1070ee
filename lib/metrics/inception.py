"""Inception score and class probability, from the judge's class probabilities."""

import numpy as np
from scipy.special import rel_entr

from lib.errors import StudyError
from lib.metrics._checks import fraction_array, whole_number
from lib.metrics.intervals import Estimate, student_interval

ROW_SUM_TOLERANCE = 1e-3  # a half-precision softmax over forty classes stays within it


def class_rows(probabilities):
    """`probabilities` as float64 (N, K), each row made to sum to 1 within float64."""
    p = fraction_array(probabilities, "probabilities", ndim=2)
    sums = p.sum(axis=1)
    worst = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[worst] - 1) > ROW_SUM_TOLERANCE:
        raise StudyError(
            f"probabilities: row {worst} sums to {sums[worst]:.6g}, not 1; apply softmax to logits"
        )
    return p / sums[:, None]


def exp_mean_divergence(p):
    """exp of the mean KL divergence between the rows p (n, K) and their mean."""
    return float(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))


def inception_score(probabilities, n_splits, generator):
    """Inception score exp(E_x KL(p(y|x) || p(y))): mean and spread over random splits.

    probabilities: (N, K), rows sum to 1; n_splits: 1 to N, splits of a random permutation, whose
    sizes differ by one at most; generator: numpy Generator. Returns (mean, std), the mean in
    [1, K]. std is the unbiased one over the splits, and NaN with one split, where no spread is
    known. A split of n rows cannot score above n: small splits are biased low. Raises StudyError
    on rows that do not sum to 1 and on more splits than rows.

    Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
    """
    p = class_rows(probabilities)
    n_splits = whole_number(n_splits, "n_splits", 1, len(p))
    order = generator.permutation(len(p))
    scores = [exp_mean_divergence(p[part]) for part in np.array_split(order, n_splits)]
    std = float(np.std(scores, ddof=1)) if n_splits > 1 else float("nan")
    return float(np.mean(scores)), std


def class_probability(probabilities, label):
    """Mean probability that the judge gives to one class, with Student's interval over shapes.

    probabilities: (N, K), rows sum to 1; label: class index, 0 to K - 1. Returns Estimate, its ends
    cut to [0, 1], which a t interval does not know; NaN for one shape. Noise can score 1: read it
    beside the value of real shapes. Raises StudyError on rows that do not sum to 1 and on a label
    out of range.

    Source: Xie et al. 2018 (3D DescriptorNet).
    """
    p = class_rows(probabilities)
    label = whole_number(label, "label", 0, p.shape[1] - 1)
    return Estimate(*np.clip(student_interval(p[:, label]), 0, 1).tolist())
